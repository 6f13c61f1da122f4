"""Every public benchmark reads each of its formats to the same samples, asks as it should, and says what is missing."""

import json

import benchmarks
import pytest
from benchmarks import CASES, place
from made import picture

from mmroute import hub
from mmroute.errors import ConfigError, InputError
from mmroute.tasks._pictures import open_image
from mmroute.tasks.base import group_mean
from mmroute.tasks.hub import _rules
from mmroute.tasks.hub._public import Public

pytest.importorskip("pyarrow")
NAMES = sorted(CASES)


def load(name, root, **options):
    return hub.load("tasks", name, data_root=str(root), **options)


def made(name, tmp_path, which=0):
    place(tmp_path / str(which), name, which)
    task = load(name, tmp_path / str(which))
    return task, list(task.samples(CASES[name].split))


def seen(sample):
    """What must not depend on the format."""
    pixels = [open_image(i).convert("RGB").tobytes() for i in sample.images]
    return (sample.id, sample.question, sample.choices, sample.answer, sample.answer_index, sample.group, pixels)


def prompt(task, sample, style=None):
    (message,) = task.messages(sample, style)
    return [b["text"] if b["type"] == "text" else "<image>" for b in message["content"]]


def test_every_benchmark_has_rows_in_two_formats_or_more():
    public = [name for name in hub.names("tasks") if issubclass(hub.find("tasks", name), Public)]
    assert public == NAMES
    assert len(public) == 23
    assert all(len(case.sources) >= 2 for case in CASES.values())


@pytest.mark.parametrize("name", NAMES)
def test_all_formats_give_the_same_samples(name, tmp_path):
    first, *others = [made(name, tmp_path, which)[1] for which in range(len(CASES[name].sources))]
    assert first
    for other in others:
        assert [seen(s) for s in other] == [seen(s) for s in first]


@pytest.mark.parametrize("name", NAMES)
def test_a_right_answer_scores_a_wrong_one_does_not_and_nonsense_is_unparsed(name, tmp_path):
    task, samples = made(name, tmp_path)
    right = [task.score(s, f"The answer is {s.answer}.") for s in samples]
    assert [(r.correct, r.parsed) for r in right] == [(1.0, True)] * len(samples)
    assert task.metrics(samples, right)["accuracy"] == 1.0
    for sample in samples:
        wrong = next((c.label for c in sample.choices if c.label != sample.answer), "77")
        assert task.score(sample, f"The answer is {wrong}.").correct == 0.0
        lost = task.score(sample, "hm\nwho can say\nnot me")
        assert (lost.correct, lost.parsed) == (0.0, False)
    with pytest.raises(ConfigError, match="no scorer named 'kind'; one of"):
        task.score(samples[0], "A", "kind")


@pytest.mark.parametrize("name", NAMES)
def test_samples_fit_the_schema_and_can_be_cut(name, tmp_path):
    task, samples = made(name, tmp_path)
    split = CASES[name].split
    assert [s.id for s in task.samples(split, 1, offset=len(samples) - 1)] == [samples[-1].id]
    for sample in samples:
        json.dumps(sample.meta)
        assert sample.prompt_images == list(range(len(sample.images)))
        assert sample.meta["license"] == task.card.license


@pytest.mark.parametrize("name", NAMES)
def test_missing_data_says_what_to_fetch_and_where_to_put_it(name, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    split = CASES[name].split
    with pytest.raises(InputError, match=rf"{name} {split}: no data .*Put there: .* in .*{name}"):
        list(load(name, tmp_path).samples(split))
    with pytest.raises(ConfigError, match="has the splits"):
        load(name, tmp_path).samples("holdout")


PROMPTS = {
    "vsr": ["<image>", 'Is this true of the image: "The Cat is left of the dog." Answer the question using yes or no.'],
    "vstar": [
        "<image>",
        "What is the color of the cup?\nA. red\nB. blue\n"
        "Answer with the option's letter from the given choices directly.",
    ],
    "gqa": ["<image>", "Is it overcast?\nAnswer the question using a single word or phrase."],
    "mmbench": [
        "<image>",
        "It is summer.\nWhich is hot?\nA. red\nB. blue\n"
        "Answer with the option's letter from the given choices directly.",
    ],
    "m3cot": [
        "<image>",
        "[Question]:\nWhat floats?\n[Context]:\nA lake.\n[Options]:\n(A) red\n(B) blue\n(C) green\n(D) grey\nAnswer:",
    ],
    "scienceqa": [
        "<image>",
        "Context: Look at the animals.\nWhich is a mammal?\nA. frog\nB. bear\n"
        "Answer with the option's letter from the given choices directly.",
    ],
    "mathvision": ["<image>", "How many?\n<image1>\nReason step by step and put the answer into \\boxed{}."],
    "mathvista": ["<image>", "Hint: Give a number with one decimal.\nQuestion: How long?"],
    "mmmu": [
        "<image>",
        " What is shown in ",
        "<image>",
        "?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly.",
    ],
    "pope": ["<image>", "Is there a dog in the image?\nAnswer the question using yes or no."],
}


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_the_first_prompt_reads_as_published(name, tmp_path):
    task, samples = made(name, tmp_path)
    assert prompt(task, samples[0]) == PROMPTS[name]
    assert prompt(task, samples[0], "cot") == PROMPTS[name]  # ways to think have no prompt of their own here


def test_vsr_has_the_prompt_and_the_rule_of_vocot(tmp_path):
    task, samples = made("vsr", tmp_path)
    told = 'Is there an event "the cat is left of the dog." taking place in the image?'
    assert prompt(task, samples[0], "vocot") == ["<image>", told]
    assert prompt(load("vsr", tmp_path / "0", prompt="vocot"), samples[0]) == ["<image>", told]
    assert task.score(samples[1], "hm", "vocot").correct == 1.0
    assert task.score(samples[1], "hm").correct == 0.0
    with pytest.raises(ConfigError, match="one of short, vocot"):
        load("vsr", tmp_path, prompt="long")


def test_winoground_scores_are_of_pairs_and_of_all_four(tmp_path):
    task, samples = made("winoground", tmp_path)
    assert [s.id[-6:] for s in samples[:4]] == ["-text0", "-text1", "image0", "image1"]
    assert [s.answer for s in samples[:4]] == ["A", "B", "A", "B"]
    assert prompt(task, samples[2])[1:4:2] == ["<image>", "<image>"]
    replies = [s.answer for s in samples]
    replies[5] = "A"  # the second text question of the second row
    found = task.metrics(samples, [task.score(s, r) for s, r in zip(samples, replies, strict=True)])
    assert (found["text_score"], found["image_score"], found["group_score"]) == (0.5, 1.0, 0.5)


def test_mmvp_counts_pairs(tmp_path):
    task, samples = made("mmvp", tmp_path)
    assert [s.group for s in samples] == ["mmvp-0000", "mmvp-0000", "mmvp-0001", "mmvp-0001"]
    found = task.metrics(samples, [task.score(s, "A") for s in samples])
    assert (found["accuracy"], found["pair_accuracy"]) == (0.5, 0.0)


def test_hallusion_counts_figures_and_questions(tmp_path):
    task, samples = made("hallusion", tmp_path)
    replies = ["yes", "no", "yes", "yes"]  # one figure right, one of two questions right
    found = task.metrics(samples, [task.score(s, r) for s, r in zip(samples, replies, strict=True)])
    assert (found["aAcc"], found["fAcc"], found["qAcc"]) == (0.75, 0.5, 0.5)


def test_hrbench_is_the_mean_over_cycles(tmp_path):
    task, samples = made("hrbench", tmp_path)
    assert len({s.group for s in samples}) == 1
    found = task.metrics(samples, [task.score(s, "A") for s in samples])
    assert found["mean_over_cycles"] == 0.25
    assert {k for k in found if k.startswith("cycle/")} == {f"cycle/{c}" for c in range(4)}


def test_pope_and_amber_count_what_is_said(tmp_path):
    task, samples = made("pope", tmp_path)
    found = task.metrics(samples, [task.score(s, "Yes") for s in samples])
    assert (found["precision"], found["recall"], found["yes_ratio"]) == (0.5, 1.0, 1.0)
    assert found["f1"] == pytest.approx(2 / 3)
    task, samples = made("amber", tmp_path)
    found = task.metrics(samples, [task.score(s, "no") for s in samples])
    assert (found["precision"], found["recall"]) == (0.5, 1.0)
    assert found["type/hallucination"] == 1.0


def test_means_of_parts_weigh_parts_alike(tmp_path):
    task, samples = made("blink", tmp_path)
    assert task.metrics(samples, [task.score(s, "A") for s in samples])["mean_of_tasks"] == 0.5
    assert group_mean(["a", "a", "a", "b"], [1, 1, 1, 0]) == 0.5


def test_other_harnesses_rules_are_scorers_of_their_own(tmp_path):
    task, samples = made("pope", tmp_path)
    assert task.score(samples[0], "Yes.", "lmms").correct == 1.0
    assert task.score(samples[0], "Yes, there is.", "lmms").correct == 0.0
    task, samples = made("seedbench2plus", tmp_path)
    assert task.score(samples[0], "Dear reader, A", "lmms") == task.score(samples[0], "D", "lmms")
    assert task.score(samples[0], "D", "lmms").scorer == "lmms"


@pytest.mark.parametrize(
    ("said", "gold", "precision", "same"),
    [
        ("1.23", "1.2", 1, True),
        ("1.27", "1.2", 1, False),
        ("1,200", "1200", None, True),
        ("50%", "0.5", None, True),
        (r"\frac{1}{2}", "0.5", None, True),
        (r"30^\circ", "30", None, True),
        (r"2\sqrt{3}", r"\sqrt{12}", None, True),
        ("(x+1)^2", "x^2+2x+1", None, True),
        ("x+1", "x-1", None, False),
        (r"\text{blue}", "Blue", None, True),
        ("__import__('os')", "1", None, False),
        ("9^9^9^9", "1", None, False),
        ("", "1", None, False),
    ],
)
def test_values_are_equal_by_meaning_and_nothing_is_run(said, gold, precision, same):
    pytest.importorskip("sympy")
    assert _rules.same_value(said, gold, precision) is same


def test_several_gold_texts_of_mmmu_count_alike(tmp_path):
    task, samples = made("mmmu", tmp_path)
    answers = {"8": 1.0, r"so \boxed{8}": 1.0, "eight": 1.0, "The answer is nine.": 0.0}
    assert {a: task.score(samples[1], a).correct for a in answers} == answers


def test_mathvista_options_count_by_text_and_letter(tmp_path):
    task, samples = made("mathvista", tmp_path)
    assert [task.score(samples[1], a).correct for a in ("B", "answer: blue", "red")] == [1.0, 1.0, 0.0]
    assert [task.score(samples[0], a).correct for a in ("1.2 cm", "It is 1.23", "1.3")] == [1.0, 1.0, 0.0]


def test_an_item_whose_answer_is_hidden_is_neither_right_nor_wrong(tmp_path):
    task = load("mathvista", tmp_path)
    hidden = task.sample({"question": "How long?", "answer": ""}, "test", 0)
    assert task.score(hidden, "1.2").correct is None


def test_videos_are_left_out_of_onethinker_and_reasoning_is_kept(tmp_path):
    _, samples = made("onethinker", tmp_path)
    assert [s.question for s in samples] == ["Which is larger?", "What is 2 + 3?"]
    assert samples[0].meta["rationale"] == "Red is small.\n\nBlue is large."


def test_broken_rows_name_their_place(tmp_path):
    place(tmp_path, "vsr", 0)
    (tmp_path / "vsr/images/000000000002.jpg").unlink()
    with pytest.raises(InputError, match=r"test.jsonl:2: picture .*000000000002.jpg' is missing .*COCO"):
        list(load("vsr", tmp_path).samples("test"))
    row = {**CASES["vsr"].sources[0][0].rows[0], "label": "maybe"}
    benchmarks.write(tmp_path / "vsr", CASES["vsr"].sources[0][0]._replace(rows=[row]))
    with pytest.raises(InputError, match="vsr test, row 0: a yes-or-no label"):
        list(load("vsr", tmp_path).samples("test"))
    row["image"] = "../../../etc/passwd"
    benchmarks.write(tmp_path / "vsr", CASES["vsr"].sources[0][0]._replace(rows=[row]))
    with pytest.raises(InputError, match="leaves"):
        list(load("vsr", tmp_path).samples("test"))


def test_a_picture_that_joins_nothing_is_named(tmp_path):
    place(tmp_path, "gqa", 0)
    benchmarks.write(
        tmp_path / "gqa", CASES["gqa"].sources[0][1]._replace(rows=[{"id": "n1", "image": benchmarks.P(1)}])
    )
    with pytest.raises(InputError, match="no picture 'n161313'"):
        list(load("gqa", tmp_path).samples("testdev"))


def test_arrow_files_and_the_hub_itself_are_read_too(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [{"index": 0, "question": "Which?\n(A) red\n(B) blue", "image": picture(3), "answer": "B", "category": "c",
             "l2_category": "d"}]  # fmt: skip
    asked = []

    def online(name, config, split):
        asked.append((name, config, split))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", online)
    (sample,) = load("mmstar", tmp_path).samples("val")
    assert asked == [("Lin-Chen/MMStar", None, "val")]
    assert (sample.question, sample.answer) == ("Which?", "B")
    columns = {"question": ["Which?\n(A) red\n(B) blue"], "image": [None], "answer": ["A"], "category": ["c"],
               "l2_category": ["d"]}  # fmt: skip
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "mmstar" / "val")
    (sample,) = load("mmstar", tmp_path).samples("val")
    assert (sample.answer, sample.images) == ("A", [])
