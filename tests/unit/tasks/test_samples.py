"""Samples of the generated worlds: hops, contexts, scores."""

import json

import pytest
from worlds import WORLDS, specs

from mmroute import hub
from mmroute.errors import ConfigError
from mmroute.tasks.base import Score, Spec, messages_so_far


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("text", ["cot", "sentence", "action"])
def test_the_hops_of_a_sample_are_the_chain(name: str, text: str) -> None:
    task = hub.load("tasks", name, hop_text=text)
    for spec in specs(task, "val", 5):
        sample = task.sample(spec)
        assert len(sample.hops) == len(task.trace(spec)) - 1
        assert sample.answer == sample.choices[sample.answer_index].label
        if text == "cot":
            written = " ".join([h.text for h in sample.hops] + [sample.answer_text])
            assert written.split() == task.words(spec, "cot").response[:-1]
        else:
            assert all(h.text.endswith(".") for h in sample.hops)
        json.dumps(sample.meta)


@pytest.mark.parametrize("name", WORLDS)
def test_the_right_completion_scores_and_others_do_not(name: str) -> None:
    task = hub.load("tasks", name)
    for spec in specs(task, "val", 8):
        sample = task.sample(spec)
        words = " ".join(task.words(spec, "cot").response[:-1])
        assert task.score(sample, words).correct == 1
        assert task.score(sample, f"The answer is {sample.answer}.").correct == 1
        wrong = sample.choices[(sample.answer_index + 1) % len(sample.choices)].label
        assert task.score(sample, f"answer: {wrong}").correct == 0
        assert not task.score(sample, "I do not know").parsed
    with pytest.raises(ConfigError, match="strict"):
        task.score(sample, words, scorer="kind")


@pytest.mark.parametrize("name", WORLDS)
def test_observed_hops_show_the_state_and_contexts_keep_what_they_say(name: str) -> None:
    task = hub.load("tasks", name, hop_images="observed")
    spec = next(s for s in specs(task, "val", 40) if len(task.trace(s)) >= 3)
    sample, trace = task.sample(spec), task.trace(spec)
    assert [h.image for h in sample.hops] == list(range(1, len(trace)))
    for hop, state in zip(sample.hops, trace[1:], strict=True):
        assert task.decode(sample.images[hop.image], spec) == state

    def pictures(context: str, hop: int) -> list[object]:
        chat = messages_so_far(task, sample, hop, context)  # type: ignore[arg-type]
        return [b["image"] for m in chat for b in m["content"] if b["type"] == "image"]

    assert pictures("accumulate", 2) == sample.images[:3]
    assert pictures("markov2", 2) == [sample.images[0], sample.images[2]]
    assert pictures("markov2", 0) == [sample.images[0]]
    texts = [b["text"] for b in messages_so_far(task, sample, 2, "markov2")[1]["content"] if b["type"] == "text"]
    assert texts == [h.text for h in sample.hops[:2]]
    with pytest.raises(ConfigError, match="hops"):
        messages_so_far(task, sample, len(trace), "accumulate")


def test_gridspatial_hops_are_boxes_of_the_objects() -> None:
    task = hub.load("tasks", "gridspatial")
    spec = task.spec("val", 0)
    hop = task.sample(spec).hops[0]
    left, top, right, bottom = hop.boxes[0]
    tile = hop.relevant[0]
    assert (round(top * 10), round(left * 10)) == divmod(tile, 10)
    assert right - left == pytest.approx(0.1)
    assert bottom - top == pytest.approx(0.1)
    assert hop.box_image == 0


@pytest.mark.parametrize("name", WORLDS)
def test_one_word_a_place_and_no_words_at_all(name: str) -> None:
    spec = hub.load("tasks", name).spec("val", 5)
    places = hub.load("tasks", name, hop_text="word").sample(spec)
    assert [h.text for h in places.hops] == [h.state for h in places.hops]
    assert all(len(h.text.split()) == 1 for h in places.hops)
    silent = hub.load("tasks", name, hop_text="direct").sample(spec)
    assert {h.text for h in silent.hops} == {""}
    assert places.answer_text == silent.answer_text == f"answer: {hub.load('tasks', name)._answer_word(spec)}"


@pytest.mark.parametrize("name", WORLDS)
def test_a_box_goes_with_plain_english_and_covers_the_cell(name: str) -> None:
    tokens = 1 if name == "minibehavior" else 4  # its rooms leave no space for larger cells
    task = hub.load("tasks", name, hop_text="box", tokens_per_cell=tokens)
    spec = task.spec("val", 5)
    plain = hub.load("tasks", name, hop_text="sentence", tokens_per_cell=tokens).sample(spec)
    sample = task.sample(spec)
    assert [h.text for h in sample.hops] == [h.text for h in plain.hops]
    for hop, state in zip(sample.hops, task.trace(spec)[1:], strict=True):
        ((left, top, right, bottom),) = hop.boxes
        covered = {
            r * spec.canvas + c
            for r in range(round(top * spec.canvas), round(bottom * spec.canvas))
            for c in range(round(left * spec.canvas), round(right * spec.canvas))
        }
        assert covered == set(task.tiles(spec, [state.cell]))
        assert hop.box_image == 0


def test_a_board_as_text_shows_cells_and_where_the_agent_is() -> None:
    world = {"grid": [[0, 1, 0], [0, 0, 0], [0, 1, 0]], "start": [1, 0], "goal": [2, 2], "actions": [3, 3]}
    spec = Spec("frozenlake", 1, "small", "train", 0, 3, 4, (0, 1), 5, world, 2, "")
    first, second = hub.load("tasks", "frozenlake", hop_text="vot").sample(spec).hops
    assert first.text == " .  O  .\n S [.] .\n .  O  G"
    assert second.text == " .  O  .\n S  . [.]\n .  O  G"


@pytest.mark.parametrize("name", WORLDS)
def test_a_board_as_text_has_one_mark_per_hop(name: str) -> None:
    task = hub.load("tasks", name, hop_text="vot")
    spec = task.spec("val", 2)
    for hop, state in zip(task.sample(spec).hops, task.trace(spec)[1:], strict=True):
        lines = hop.text.split("\n")
        assert len(lines) == spec.n
        assert [r for r, line in enumerate(lines) if "[" in line] == [state.cell[0]]


def test_pictures_to_be_drawn_are_the_observed_ones_under_another_name() -> None:
    observed, generated = (hub.load("tasks", "maze", hop_images=x) for x in ("observed", "generated"))
    a, b = observed.sample(observed.spec("val", 0)), generated.sample(observed.spec("val", 0))
    assert [i.tobytes() for i in a.images] == [i.tobytes() for i in b.images]
    assert (a.meta["hop_images"], b.meta["hop_images"]) == ("observed", "generated")


def test_other_rules_score_by_name() -> None:
    task = hub.load("tasks", "maze")
    sample = task.sample(task.spec("val", 0))
    assert task.score(sample, f"answer: {sample.answer}", "mvot") == Score(0.0, None, False, "mvot")
    assert task.score(sample, f"The answer is {sample.answer}.", "mvot").correct == 1
