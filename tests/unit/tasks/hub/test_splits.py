"""No file answers for a split that it does not hold, and a number of rows that is not the published one is told."""

import logging

import pytest
from benchmarks import P, write
from benchmarks.rows import Files, lettered

from mmroute import hub
from mmroute.errors import InputError
from mmroute.tasks._import import import_samples
from mmroute.tasks.base import Card
from mmroute.tasks.hub._public import Public
from mmroute.tasks.hub._readers import HubRows, SplitColumn, Tsv

PUBLIC = [name for name in hub.names("tasks") if issubclass(hub.find("tasks", name), Public)]


def load(name, root):
    return hub.load("tasks", name, data_root=str(root))


def put(root, name, file, *rows, images=""):
    write(root / name, Files(file, list(rows), images))


def asked(root, name, split):
    return [s.question for s in load(name, root).samples(split)]


@pytest.fixture
def offline(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_file_of_a_benchmark_with_several_splits_says_which_it_holds(name, tmp_path):
    task = hub.find("tasks", name)
    for source in task.sources:
        held = [split for split in task.card.splits if source.holds(split)]
        places = {source.wants(tmp_path, split).split(" in ")[0] for split in held}
        told_apart = isinstance(source, HubRows) or source.by is not None
        assert held
        assert told_apart or len(places) == len(held)


@pytest.mark.parametrize("file", ["HRBench8K.tsv", "hr_bench_8k.tsv"])
def test_hrbench_8k_is_its_own_table_under_either_name(file, tmp_path, offline):
    put(tmp_path, "hrbench", "HRBench4K.tsv", lettered("Small?", ["red", "blue"], "A", P(1), category="single"))
    with pytest.raises(InputError, match=r"hrbench hrbench_8k: no data .*HRBench8K.tsv"):
        asked(tmp_path, "hrbench", "hrbench_8k")
    put(tmp_path, "hrbench", file, lettered("Large?", ["red", "blue"], "A", P(1), category="single"))
    assert asked(tmp_path, "hrbench", "hrbench_8k") == ["Large?"]
    assert asked(tmp_path, "hrbench", "hrbench_4k") == ["Small?"]


def test_hrbench_4k_is_found_under_its_own_name(tmp_path):
    put(tmp_path, "hrbench", "hr_bench_4k.tsv", lettered("Small?", ["red", "blue"], "A", P(1), category="single"))
    assert asked(tmp_path, "hrbench", "hrbench_4k") == ["Small?"]


@pytest.mark.parametrize("split", ["dev", "train"])
def test_vsr_has_no_table_but_that_of_its_test_split(split, tmp_path, offline):
    row = {"index": 0, "image": P(1), "question": "The cat is left of the dog.", "answer": "Yes", "category": "left of"}
    put(tmp_path, "vsr", "VSR-zeroshot.tsv", row)
    assert len(asked(tmp_path, "vsr", "test")) == 1
    with pytest.raises(InputError, match=rf"vsr {split}: no data .*Put there: {split}.jsonl") as told:
        asked(tmp_path, "vsr", split)
    assert "VSR-zeroshot" not in str(told.value)


def test_dev_and_validation_of_mmmu_are_told_apart_by_their_column(tmp_path):
    rows = [
        lettered(f"Of {split}?", ["red", "blue"], "A", image, index=i, category="Art", split=split)
        for i, (split, image) in enumerate([("dev", P(1)), ("validation", 0), ("test", P(2))])
    ]
    put(tmp_path, "mmmu", "MMMU_DEV_VAL.tsv", *rows)
    assert asked(tmp_path, "mmmu", "dev") == ["Of dev?"]
    (sample,) = load("mmmu", tmp_path).samples("validation")
    assert sample.question == "Of validation?"
    assert len(sample.images) == 1  # named by a row of the other split
    del rows[0]["split"], rows[1]["split"], rows[2]["split"]
    put(tmp_path, "mmmu", "MMMU_DEV_VAL.tsv", *rows)
    with pytest.raises(InputError, match=r"MMMU_DEV_VAL.tsv:2: no column 'split', which tells dev, validation apart"):
        asked(tmp_path, "mmmu", "dev")


def test_the_small_part_of_mathvision_is_its_own_table(tmp_path, offline):
    def row(question):
        return {"index": 1, "question": question, "image": P(1), "choices": "[]", "answer": "1"}

    put(tmp_path, "mathvision", "MathVision.tsv", row("All?"))
    with pytest.raises(InputError, match=r"testmini: no data .*MathVision_MINI.tsv"):
        asked(tmp_path, "mathvision", "testmini")
    put(tmp_path, "mathvision", "MathVision_MINI.tsv", row("Some?"))
    assert asked(tmp_path, "mathvision", "testmini") == ["Some?"]
    assert asked(tmp_path, "mathvision", "test") == ["All?"]


def test_the_whole_of_mathvista_is_not_its_small_part(tmp_path, offline):
    row = {"index": 1, "question": "How long?", "image": P(1), "choices": "", "answer": "1"}
    put(tmp_path, "mathvista", "MathVista_MINI.tsv", row)
    assert len(asked(tmp_path, "mathvista", "testmini")) == 1
    with pytest.raises(InputError, match="mathvista test: no data"):
        asked(tmp_path, "mathvista", "test")


def test_questions_of_hallusion_without_a_figure_are_told_apart_in_its_list(tmp_path, offline):
    place = {"category": "VS", "subcategory": "chart", "set_id": "0", "question_id": "0", "gt_answer": "1"}
    rows = [
        {**place, "visual_input": seen, "figure_id": str(i), "question": f"Seen {seen}?", "filename": image}
        for i, (seen, image) in enumerate([("0", None), ("1", P(1)), ("2", P(2))])
    ]
    put(tmp_path, "hallusion", "HallusionBench.json", *rows, images="images")
    assert asked(tmp_path, "hallusion", "image") == ["Seen 1?", "Seen 2?"]
    (alone,) = load("hallusion", tmp_path).samples("non_image")
    assert (alone.question, alone.images) == ("Seen 0?", [])
    (tmp_path / "hallusion/HallusionBench.json").unlink()
    row = {"index": "chart_0_1_0", "category": "VS", "l2-category": "chart", "image": P(1), "question": "Seen?"}
    put(tmp_path, "hallusion", "HallusionBench.tsv", {**row, "answer": "Yes"})
    assert asked(tmp_path, "hallusion", "image") == ["Seen?"]
    with pytest.raises(InputError, match="hallusion non_image: no data"):
        asked(tmp_path, "hallusion", "non_image")


def test_validation_and_test_of_scienceqa_are_two_tables_and_training_is_in_none(tmp_path, offline):
    def row(question):
        return lettered(question, ["frog", "bear"], "B", P(1), hint="", category="natural science")

    put(tmp_path, "scienceqa", "ScienceQA_VAL.tsv", row("Which?"))
    put(tmp_path, "scienceqa", "ScienceQA_TEST.tsv", row("What?"))
    assert asked(tmp_path, "scienceqa", "validation") == ["Which?"]
    assert asked(tmp_path, "scienceqa", "test") == ["What?"]
    with pytest.raises(InputError, match="scienceqa train: no data"):
        asked(tmp_path, "scienceqa", "train")


def test_an_importer_reads_each_split_from_its_own_file(tmp_path):
    row = lettered("Which?", ["frog", "bear"], "B", P(1), hint="", category="natural science", solution="So. Thus.")
    write(tmp_path, Files("ScienceQA_TEST.tsv", [row]))
    assert [s.split for s in import_samples(tmp_path, "scienceqa")] == ["test"]


class Two(Public):
    """Two rows are published of it, told apart from others by a column."""

    name = "two"
    card = Card(("x/two",), {"test": 2, "dev": 1}, "MIT", "generate", "accuracy", 0.5)
    sources = (Tsv("two", by=SplitColumn("part", {"test": ("t",), "dev": ("d",)})),)
    categories = ()

    def sample(self, row, split, number):
        return self.make(split, number, question=row["question"], images=[], options=["red", "blue"], answer="A")


@pytest.mark.parametrize(
    ("rows", "n", "told"),
    [
        ("tt", None, None),
        ("tt", 2, None),
        ("t", 1, "two test: 1 rows, 2 are published"),
        ("t", None, "two test: 1 rows, 2 are published"),
        ("ttt", 1, None),  # nobody read that far
        ("ttt", 2, "two test: more rows than the 2 that are published"),
        ("ttt", None, "two test: more rows than the 2 that are published"),
        ("ddtdt", None, None),
        ("d", None, "two test: no rows, 2 are published"),
    ],
)
def test_another_number_of_rows_than_published_is_told_and_is_no_error(rows, n, told, tmp_path, caplog):
    put(tmp_path, "two", "two.tsv", *[{"index": i, "part": p, "question": "?"} for i, p in enumerate(rows)])
    with caplog.at_level(logging.WARNING):
        found = list(Two(data_root=str(tmp_path)).samples("test", n))
    assert len(found) == min(rows.count("t"), n or 9)
    assert [r.getMessage() for r in caplog.records] == ([told] if told else [])
