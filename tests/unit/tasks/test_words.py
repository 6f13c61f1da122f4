"""The closed vocabulary, and the chains, probes and prompts written in it."""

import hashlib

import pytest
from worlds import WORLDS, existing, specs

from mmroute import hub
from mmroute.tasks._solver import solve
from mmroute.tasks._texts import IMAGE, SPECIAL, VOCABULARY, position
from mmroute.tasks.base import Spec


@pytest.mark.parametrize(("name", "preset"), existing(["small", "tiny", "nano", "wide", "ood-hops"]))
def test_every_word_is_in_the_vocabulary(name: str, preset: str) -> None:
    task, known = hub.load("tasks", name, preset=preset), set(VOCABULARY)
    for spec in [*specs(task, "train", 20), *specs(task, "test", 8)]:
        for mode in ("cot", "direct", "probe"):
            words = task.words(spec, mode)
            assert set(words.prompt + words.response) <= known
            assert len(words.supervised) == len(words.response)


def test_the_vocabulary_has_384_distinct_words_and_qwens_names_first() -> None:
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 384
    assert tuple(VOCABULARY[: len(SPECIAL)]) == SPECIAL
    assert "<|image_pad|>" in SPECIAL
    # the order is part of trained checkpoints
    assert hashlib.sha256(" ".join(VOCABULARY).encode()).hexdigest()[:16] == "2987713477be9bb1"


def test_a_lake_chain_reads_as_the_specification_says() -> None:
    world = {"grid": [[0, 1, 0]] * 3, "start": [1, 0], "goal": [2, 2], "actions": [0, 3]}
    spec = Spec("frozenlake", 1, "small", "train", 0, 3, 4, (0, 1), 5, world, 1, "")
    task = hub.load("tasks", "frozenlake")
    words = task.words(spec, "cot")
    assert " ".join(w for w in words.prompt if w != IMAGE) == (
        "<|im_start|> task: frozenlake <|vision_start|> <|vision_end|> actions: s1 up s2 right cot:"
    )
    assert " ".join(words.response) == "start r1c1 . s1 up r0c1 ice s2 right r0c2 hole answer: hole_fall <|im_end|>"
    assert all(words.supervised)


def test_a_blocked_maze_move_writes_the_wall_and_then_where_the_agent_stays() -> None:
    plates = [[0, 0], [0, 2], [2, 0], [2, 2]]
    board = [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    world = {"walls": "tiles", "board": board, "start": [1, 1], "plates": plates, "actions": [3, 0, 1]}
    spec = Spec("maze", 1, "small", "train", 0, 3, 4, (1, 0), 5, world, 0, "")
    words = hub.load("tasks", "maze").words(spec, "cot").response
    assert " ".join(words) == (
        "start r2c1 . s1 right r2c2 wall r2c1 s2 up r1c1 free s3 left r1c0 A answer: A <|im_end|>"
    )


@pytest.mark.parametrize("name", WORLDS)
def test_outcomes_are_words_of_the_chain_and_sentences_are_known_words(name: str) -> None:
    task, known = hub.load("tasks", name), set(VOCABULARY)
    for spec in specs(task, "train", 20):
        chain, outcomes = task.chain(spec), task.outcomes(spec)
        assert len(outcomes) == len(chain)
        for words in outcomes:
            assert words
            assert set(words) <= {w for s in chain for w in s}
        assert {w for step in task.sentences(spec) for w in step} <= known


def test_outcomes_begin_with_the_place_where_a_step_ends_and_gridspatial_ends_in_what_it_settles() -> None:
    for name in ("arrows", "frozenlake", "maze"):
        task = hub.load("tasks", name)
        for spec in specs(task, "val", 10):
            places = [task.at(spec, state.cell) for state in task.trace(spec) if state.cell is not None]
            outcomes = task.outcomes(spec)
            assert [words[0] for words in outcomes] == places
            steps = [f"s{i}" for i in range(1, len(places))] if name != "arrows" else []
            assert [words[1] for words in outcomes if len(words) == 2] == steps
    grid = hub.load("tasks", "gridspatial")
    for spec in specs(grid, "val", 40):
        last = grid.outcomes(spec)[-1]
        assert grid.choices(spec)[spec.answer].label in last[-2:]  # of the nearest the distance is written too


def test_sentences_say_where_each_step_leads() -> None:
    world = {"grid": [[0, 1, 0]] * 3, "start": [1, 0], "goal": [2, 2], "actions": [0, 3]}
    spec = Spec("frozenlake", 1, "small", "train", 0, 3, 4, (0, 1), 5, world, 1, "")
    assert [" ".join(words) for words in hub.load("tasks", "frozenlake").sentences(spec)] == [
        "I am at r1c1 .",
        "After s1 , moving up , I am at r0c1 , which is ice .",
        "After s2 , moving right , I am at r0c2 , which is hole .",
    ]


@pytest.mark.parametrize("name", WORLDS)
def test_probes_ask_what_the_tiles_show_and_supervise_answers_only(name: str) -> None:
    task = hub.load("tasks", name)
    for spec in specs(task, "train", 20):
        words = task.words(spec, "probe")
        response = words.response[:-1]
        asked = [
            position(w)
            for w, s in zip(response, words.supervised, strict=False)
            if w[0] == "r" and w[1].isdigit() and not s
        ]
        assert 0 < len(asked) <= 14
        for i, (word, on) in enumerate(zip(response, words.supervised, strict=False)):
            if on or word == "." or not (word[0] == "r" and word[1].isdigit()):
                continue
            cell = (position(word)[0] - spec.offset[0], position(word)[1] - spec.offset[1])
            seen = task._seen(spec, cell)
            assert response[i + 1 : i + 1 + len(seen)] == seen
            assert all(words.supervised[i + 1 : i + 1 + len(seen)])


@pytest.mark.parametrize("order", ["image_first", "question_first"])
@pytest.mark.parametrize("name", WORLDS)
def test_messages_printed_in_order_are_the_words(name: str, order: str) -> None:
    task = hub.load("tasks", name, prompt_order=order)
    spec = task.spec("val", 3)
    for mode in ("cot", "direct", "probe"):
        (message,) = task.messages(task.sample(spec), mode)
        printed = ["<|im_start|>"]
        for block in message["content"]:
            is_image = block["type"] == "image"
            printed += (
                ["<|vision_start|>", *[IMAGE] * spec.canvas**2, "<|vision_end|>"] if is_image else block["text"].split()
            )
        assert printed == task.words(spec, mode).prompt


def test_step_words_may_start_later_in_prompt_and_chain_alike() -> None:
    task = hub.load("tasks", "frozenlake", step_offset=8)
    firsts = set()
    for spec in specs(task, "train", 60):
        question, chain = task.question_words(spec), task.words(spec, "cot").response
        first = int(question[1][1:])
        firsts.add(first)
        assert question[1::2] == [f"s{first + i}" for i in range(len(spec.world["actions"]))]
        assert [w for w in chain if w in VOCABULARY[264:288]] == question[1::2][: len(task.trace(spec)) - 1]
        assert solve("frozenlake", question, task.codes(spec)) == task._answer_word(spec)
    assert firsts == set(range(1, 9))
