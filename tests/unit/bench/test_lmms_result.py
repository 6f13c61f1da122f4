"""A run of lmms-eval as a result file: its figures with the costs of the same items, and nothing of another run."""

import json

import pytest

from mmroute.bench.lmms_result import summary
from mmroute.errors import InputError


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "out" / "tiny"
    folder.mkdir(parents=True)
    said = {
        "results": {"lake": {"alias": "lake", "acc,none": 0.5, "acc_stderr_clustered,none": "N/A"}},
        "n-samples": {"lake": {"original": 9, "effective": 2}},
        "config": {
            "model": "mmroute",
            "model_args": "pretrained=tiny",
            "batch_size": "8",
            "limit": None,
            "device": "x",
        },
    }
    (folder / "2026_results.json").write_text(json.dumps(said))
    line = {"task": "lake", "kv_bytes": 10, "ar_steps": 4, "prompt_tokens": 7}
    lines = [{**line, "doc_id": i, "flops": i, "keep": {"vision": i / 2, "text": 1}} for i in (1, 0)]
    (tmp_path / "costs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return tmp_path


def test_figures_and_mean_costs_of_the_items_are_told(run):
    found = summary(run / "out", run / "costs.jsonl")
    assert found["arguments"] == {"model": "mmroute", "model_args": "pretrained=tiny", "batch_size": "8", "limit": None}
    costs = {"flops": 0.5, "kv_bytes": 10, "ar_steps": 4, "prompt_tokens": 7, "keep": {"vision": 0.25, "text": 1}}
    assert found["tasks"] == {"lake": {"n": 2, "figures": {"acc,none": 0.5}, "costs": costs}}


def test_files_of_other_runs_are_refused(run):
    with (run / "costs.jsonl").open("a") as file:
        file.write(json.dumps({"task": "lake", "doc_id": 0}) + "\n")
    with pytest.raises(InputError, match="3 lines for the 2 items of lake"):
        summary(run / "out", run / "costs.jsonl")
    with pytest.raises(InputError, match="holds 0 result files"):
        summary(run / "nowhere", run / "costs.jsonl")
