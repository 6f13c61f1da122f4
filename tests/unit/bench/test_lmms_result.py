"""A run of lmms-eval as a result file: its figures with the costs of the same items, and nothing of another run."""

import dataclasses
import hashlib
import json

import pytest

from mmroute.bench import lmms_schema, schema, table
from mmroute.bench.lmms_result import summary
from mmroute.errors import ConfigError, InputError

GIVEN = {
    "model": "mmroute",
    "model_args": "pretrained=tiny,recipe=dare-l",
    "include_path": "lakes of mine",
    "tasks": "lake",
    "num_fewshot": None,
    "batch_size": "8",
    "limit": None,
    "gen_kwargs": "",
    "seed": [0, 1234],
    "output_path": "out",
    "verbosity": "INFO",
}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "out" / "tiny"
    folder.mkdir(parents=True)
    said = {
        "results": {"lake": {"alias": "lake", "acc,none": 0.5, "acc_stderr_clustered,none": "N/A"}},
        "n-samples": {"lake": {"original": 9, "effective": 2}},
        "config": {"model": "mmroute", "device": "x", "resolved_cli_args": GIVEN},
        "total_evaluation_time_seconds": "4.5",
    }
    (folder / "2026_results.json").write_text(json.dumps(said))
    line = {"task": "lake", "recipe": "dare-l", "kv_bytes": 10, "prompt_tokens": 7, "reasoning_tokens": 3}
    lines = [
        {
            **line,
            "doc_id": i,
            "id": f"lake-{i}",
            "flops": i,
            "output_tokens": 4 + i,
            "keep": {"vision": i / 2, "text": 1},
        }
        for i in (1, 0)
    ]
    (tmp_path / "costs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return tmp_path


def test_figures_tokens_and_mean_costs_of_the_items_are_told_with_the_harness_command(run):
    found = summary(run / "out", run / "costs.jsonl", "python -m this")
    asked = "--model mmroute --model_args pretrained=tiny,recipe=dare-l --include_path 'lakes of mine' --tasks lake"
    assert found.harness == f"lmms-eval {asked} --batch_size 8 --seed 0,1234 --output_path out"
    assert (found.run.command, found.run.wall_s) == ("python -m this", 4.5)
    assert (found.model, found.recipe) == ("tiny", "dare-l")
    assert found.versions["torch"].startswith("2.")
    assert found.tasks == {
        "lake": lmms_schema.LmmsTask(
            n=2,
            ids_sha256=hashlib.sha256(b"lake-0\nlake-1").hexdigest(),
            figures={"acc,none": 0.5},
            prompt_tokens=7,
            output_tokens=4.5,
            reasoning_tokens=3,
            flops=0.5,
            kv_bytes=10,
            vision_keep=0.25,
            text_keep=1,
        )
    }


def test_files_of_other_runs_are_refused(run):
    with (run / "costs.jsonl").open("a") as file:
        file.write(json.dumps({"task": "lake", "recipe": "dare-l", "doc_id": 0}) + "\n")
    with pytest.raises(InputError, match="3 lines for the 2 items of lake"):
        summary(run / "out", run / "costs.jsonl")
    with (run / "costs.jsonl").open("a") as file:
        file.write(json.dumps({"task": "lake", "recipe": "none", "doc_id": 0}) + "\n")
    with pytest.raises(InputError, match=r"is of 2 recipes \(dare-l, none\)"):
        summary(run / "out", run / "costs.jsonl")
    with pytest.raises(InputError, match="holds 0 result files"):
        summary(run / "nowhere", run / "costs.jsonl")


def test_the_file_reads_back_and_its_row_is_divided_by_the_unrouted_run_of_the_same_items(run, tmp_path):
    routed = summary(run / "out", run / "costs.jsonl")
    task = routed.tasks["lake"]
    said = {"acc,none": 0.75, "acc_stderr,none": 0.1}
    whole = dataclasses.replace(task, flops=2.0, kv_bytes=40.0, vision_keep=1.0, figures=said)
    stock = dataclasses.replace(routed, recipe="none", tasks={"lake": whole})
    folder = tmp_path / "lmms"
    folder.mkdir()
    for name, each in {"a": routed, "b": stock}.items():
        schema.write_result(folder / f"{name}.json", each)
    assert lmms_schema.read_lmms(folder / "a.json") == routed
    *_, first, second = table.table_of(folder, allow_dirty=True).splitlines()
    assert first.startswith("| lake | tiny | none | acc 0.750 (0.100) | 1.000 | 1.000 | 1.00 / 1.00 |")
    assert second == "| lake | tiny | dare-l | acc 0.500 | 0.250 | 0.250 | 0.25 / 1.00 | 7.0 / 4.5 / 3.0 | 2 |"
    others = dataclasses.replace(stock, tasks={"lake": dataclasses.replace(whole, ids_sha256="of other items")})
    assert "| dare-l | acc 0.500 | n/a | n/a |" in lmms_schema.lmms_table([routed, others])
    broken = json.loads((folder / "a.json").read_text())
    del broken["harness"]
    (folder / "a.json").write_text(json.dumps(broken))
    with pytest.raises(ConfigError, match="harness"):
        lmms_schema.read_lmms(folder / "a.json")
