"""`mmroute eval` on made rows of public benchmarks: the figures that are usual for one reach whoever asked."""

import hashlib
import json

import pytest
from benchmarks import CASES, P, place, write
from benchmarks.rows import Files, lettered

from mmroute.bench import schema
from mmroute.cli.evaluate import evaluate
from mmroute.tasks.hub.mmvp import MMVP

SHORT = ["think.name=direct", "think.max_new_tokens=2"]


@pytest.fixture
def ask(tmp_path, capsys):
    """`mmroute eval` of the bundled model: its card, its last line, and its result file."""

    def call(task, n, against="", split="test"):
        out = tmp_path / "result.json"
        settings = [*SHORT, *([] if ":" in task else [f"task.data_root={tmp_path}"])]
        evaluate(
            task=task, recipe="none", n=n, seed=0, against=against, model="tiny", batch=4, split=split,
            rounds=1, out=out, set_=settings, json_=True,
        )  # fmt: skip
        printed = capsys.readouterr()
        return printed.err, json.loads(printed.out), schema.read_result(out)

    return call


def test_pairs_of_mmvp_are_in_the_card_the_line_and_the_file(ask, tmp_path, monkeypatch):
    place(tmp_path, "mmvp", 0)
    said = iter("ABAA" * 2)
    real = MMVP.score
    monkeypatch.setattr(MMVP, "score", lambda task, sample, *_: real(task, sample, next(said)))
    card, line, result = ask("mmvp", 4, against="direct")
    assert result.quality.accuracy == 0.75
    assert result.quality.metrics == {"pair_accuracy": 0.5} == line["metrics"] == line["baseline"]["metrics"]
    assert "none         pair_accuracy 0.500\n" in card
    assert "direct       pair_accuracy 0.500\n" in card
    digest = hashlib.sha256(hashlib.sha256((tmp_path / "mmvp/MMVP.tsv").read_bytes()).digest()).hexdigest()[:16]
    assert result.task.dataset == schema.Dataset(id="MMVP.tsv", revision=f"sha256:{digest}", labels="published")
    assert line["dataset"] == {"id": "MMVP.tsv", "revision": f"sha256:{digest}", "labels": "published"}
    assert f"data MMVP.tsv, revision sha256:{digest}, labels published; scorer strict, protocol generate\n" in card


def test_parts_stand_behind_the_whole_and_what_is_cut_is_no_figure(ask, tmp_path):
    place(tmp_path, "pope", 0)
    card, line, result = ask("pope", 2)
    assert {"precision", "recall", "f1", "yes_ratio"} < set(line["metrics"])
    assert "none         by category: adversarial 0.000, popular 0.000\n" in card
    assert result.quality.metrics["category/popular"] == 0.0
    place(tmp_path, "mmvp", 0)
    _, line, _ = ask("mmvp", 1)
    assert line["metrics"] == {}  # half a pair


def test_corrected_labels_are_named(ask, tmp_path):
    pytest.importorskip("pyarrow")
    rows = CASES["mmvp"].sources[1][0].rows
    write(tmp_path / "mmvp", Files("data/train-00000-of-00001.parquet", rows))
    _, line, _ = ask("mmvp", 2)
    assert line["dataset"]["id"] == "lmms-lab-eval/MMVP"
    assert line["dataset"]["labels"] == "lmms-lab-eval, 4 corrected"
    (sample, *_) = MMVP(data_root=str(tmp_path)).samples("test")
    assert sample.meta["labels"] == "lmms-lab-eval, 4 corrected"


def test_another_revision_of_a_file_is_another_revision(tmp_path):
    def revision(question):
        write(tmp_path / "mmvp", Files("MMVP.tsv", [lettered(question, ["red", "blue"], "A", P(1))]))
        return MMVP(data_root=str(tmp_path)).origin("test").revision

    assert revision("Which?") == revision("Which?") != revision("What?")


def test_the_hub_names_its_commit(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    class Builder:
        hash = "0" * 40

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: Builder if name == "MMVP/MMVP" else None)
    assert MMVP(data_root=str(tmp_path)).origin("test").revision == "0" * 40


def test_a_generated_task_has_neither(ask):
    card, line, result = ask("maze:nano", 1)
    assert "metrics" not in line
    assert "dataset" not in line
    assert "data " not in card
    assert (result.task.dataset, result.quality.metrics) == (None, {})


def test_clevr4_is_answered_by_likelihood_as_its_card_says(ask, tmp_path):
    place(tmp_path, "clevr4", 0)
    n = len(CASES["clevr4"].sources[0][0].rows)
    card, line, result = ask("clevr4", n, against="cut")
    assert (result.task.protocol, result.task.scorer) == ("likelihood", "likelihood")
    assert "scorer likelihood, protocol likelihood\n" in card
    assert line["ar_steps"] == 1.0
    assert line["ratio"]["flops"] < 1.1
