"""A bench from recipe to page on a random model and a task of a few lines: resumed, compared, drawn."""

import dataclasses
import json
from typing import ClassVar

import pytest
import torch
from PIL import Image

from mmroute import hub
from mmroute import recipe as recipes
from mmroute.backbones.load import load
from mmroute.bench import compare, grid, report, schema, stats, suite
from mmroute.cli.bench import bench
from mmroute.errors import InputError
from mmroute.tasks.base import Choice, Hop, Sample, Score, Task


class Colours(Task):
    """Plain pictures; what is answered depends on the length of what is written."""

    name: ClassVar[str] = "colours"

    def samples(self, split, n=None, offset=0):
        for i in range(offset, offset + n):
            yield Sample(
                id=f"colours-{i}",
                task=self.name,
                split=split,
                group=f"pair-{i // 2}",
                question=f"Which colour is it, {i}?",
                images=[Image.new("RGB", (24, 24 + 8 * (i % 2)), (i * 9 % 255, 40, 90))],
                prompt_images=[0],
                hops=[Hop("look", relevant=[0])],
                choices=[Choice("red"), Choice("blue")],
                answer="red",
                answer_index=0,
                answer_text="red",
                difficulty={},
                meta={"canvas": [3, 3, 8], "board": [0, 1, 2], "relevant": {"start": [4], "answer": [5]}},
            )

    def messages(self, sample, style=None):
        image = {"type": "image", "image": sample.images[0]}
        return [{"role": "user", "content": [image, {"type": "text", "text": f"{sample.question} {style}"}]}]

    def score(self, sample, completion, scorer=None):
        said = ("red", "blue", None)[sum(map(ord, completion)) % 3]
        return Score(float(said == "red"), said, said is not None, "sum")


@pytest.fixture(scope="module", autouse=True)
def _colours():
    real = hub.load

    def load_too(kind, name, **given):
        return Colours(**given) if name == "colours" else real(kind, name, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "load", load_too)
        yield


RECIPE = """
tasks: [colours]
n: 4
seeds: [0, 1]
vision: [0.5, 0.2]
text: [1.0, 0.7]
batch: 2
methods:
  none: {set: {think.max_new_tokens: 3}}
  random: {set: {think.max_new_tokens: 3}}
  fastv: {set: {think.max_new_tokens: 3, prune.start_layer: 1}}
  streaming: {set: {think.max_new_tokens: 3}}
"""


APPEND = {"prune.cache_policy": "append"}


@pytest.fixture(scope="module")
def folder(tiny_folder):
    return tiny_folder("qwen2_5_vl")


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, folder):
    path = tmp_path_factory.mktemp("recipe") / "mini.yaml"
    path.write_text(f"{RECIPE}model: {json.dumps(str(folder))}\n")
    return path


@pytest.fixture(scope="module")
def done(recipe, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    plan = suite.Suite.plan(grid.read(str(recipe)), model, out / "mini")
    told = []
    suite.run(plan, model, "test", told=lambda *line: told.append(line))
    return plan, out, told


def test_every_run_leaves_a_file_that_says_what_it_was(done):
    plan, _, told = done
    assert [(n, total) for _, n, total in told] == [(i + 1, len(plan.jobs)) for i in range(len(plan.jobs))]
    # none once; random 4 budgets; fastv 1 (.2 is infeasible on 3 layers) and its control; streaming 4 and theirs.
    assert len(plan.jobs) == 2 * (1 + 4 + 2 + 8)
    for path in plan.files():
        found = schema.read_result(path)
        assert found.task.groups == "2,2"
        assert len(found.quality.predicted) == 4
        assert found.model.weights_sha256 == plan.weights
        assert found.method.control == "" or (path.parent / found.method.control).is_file()


def test_a_finished_run_is_not_run_again_and_a_lost_one_is(done, model):
    plan, _, _ = done
    assert plan.left() == []
    assert suite.run(plan, model, "test") == 0
    lost = plan.files()[3]
    before = schema.read_result(lost)
    lost.unlink()
    assert [plan.folder / job.file for job in plan.left()] == [lost]
    assert suite.run(plan, model, "test") == 1
    again = schema.read_result(lost)
    assert dataclasses.replace(again, run=before.run) == before


def test_a_run_that_is_killed_leaves_no_file(recipe, model, tmp_path, monkeypatch):
    plan = suite.Suite.plan(grid.read(str(recipe), methods=["none"]), model, tmp_path)
    real = suite.answer_prompts
    calls = []

    def killed(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(suite, "answer_prompts", killed)
    with pytest.raises(KeyboardInterrupt):
        suite.run(plan, model, "test")
    assert [path.name for path in tmp_path.iterdir()] == [plan.jobs[0].file]
    assert len(plan.left()) == 1


def test_other_weights_are_other_runs(recipe, model, tmp_path):
    chosen = grid.read(str(recipe), methods=["none"])
    before = {job.file for job in suite.Suite.plan(chosen, model, tmp_path).jobs}
    weight = model.get_input_embeddings().weight
    weight.data[0, 0] += 1
    try:
        assert not before & {job.file for job in suite.Suite.plan(chosen, model, tmp_path).jobs}
    finally:
        weight.data[0, 0] -= 1


def test_lines_pool_seeds_and_pair_items(done):
    plan, out, _ = done
    sheet = compare.read_sheet(out / "mini")
    at = {(line.row, line.budget.vision, line.budget.text): line for line in sheet.lines}
    assert not any(row.startswith("random@") for row, _, _ in at)
    none, fastv = at["none", 1.0, 1.0], at["fastv", 0.5, 1.0]
    assert none.n == fastv.n == 8
    assert (none.flops, none.kv, none.to_none, none.loyalty) == (1.0, 1.0, None, none_loyalty(none))
    ours, theirs = ("".join(r.quality.correct for r in line.results) for line in (fastv, none))
    want = stats.paired_bootstrap(
        list(map(int, ours)), list(map(int, theirs)), groups=[0, 0, 1, 1, 2, 2, 3, 3], resamples=4000
    )
    assert fastv.to_none == want
    said, base = ("".join(r.quality.predicted for r in line.results) for line in (fastv, none))
    assert fastv.loyalty == pytest.approx(sum(a == b != "-" for a, b in zip(said, base, strict=True)) / 8)
    assert fastv.flops < 1 > fastv.kv
    control = [schema.read_result(plan.folder / r.method.control) for r in fastv.results]
    assert {c.method.row for c in control} == {"random@fastv"}
    assert fastv.to_random.diff == pytest.approx(
        sum(r.quality.accuracy - c.quality.accuracy for r, c in zip(fastv.results, control, strict=True)) / 2
    )
    assert at["streaming", 0.5, 1.0].budget.unit == "kv_share"
    assert at["streaming", 0.5, 1.0].share("vision") == 1.0
    assert at["streaming", 0.5, 1.0].kv < 1


def none_loyalty(line):
    """The unrouted model agrees with itself wherever it says anything."""
    said = "".join(r.quality.predicted for r in line.results)
    return sum(c != "-" for c in said) / len(said)


def test_the_page_has_every_line_and_says_what_is_infeasible(done):
    pytest.importorskip("matplotlib")
    plan, out, _ = done
    card = report.write(out, "mini")
    page = (out / "README.md").read_text()
    assert page == report.page(out)
    for row in ("none", "random", "fastv", "streaming"):
        assert f"| {row} |" in page
    assert "| fastv |  | 0.20 | infeasible |" in page
    assert "| kv 0.20 / 0.70 |" in page
    svgs = sorted(out.joinpath("mini").glob("*.svg"))
    pictures = ["accuracy-over-flops", "accuracy-over-kv", "keep-kv", "keep-text", "keep-vision", "kv-over-hops"]
    assert [p.stem for p in svgs] == pictures
    before = [p.read_bytes() for p in svgs]
    report.write(out, "mini")
    assert [p.read_bytes() for p in svgs] == before  # the same files, the same bytes
    assert any(line.startswith("mini, colours-v1, n 8: none") for line in card.lines)
    assert {row["method"] for row in card.summary["tasks"]["colours-v1"]} == {"none", "random", "fastv", "streaming"}
    assert plan.infeasible


def test_results_of_another_size_stand_apart(done, recipe, model, tmp_path):
    plan, _, _ = done
    for path in plan.folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    small = suite.Suite.plan(grid.read(str(recipe), ["n=2", "seeds=[0]"], ["none"]), model, tmp_path)
    suite.run(small, model, "test")
    newest = small.files()[0]
    found = schema.read_result(newest)
    schema.write_result(newest, dataclasses.replace(found, run=dataclasses.replace(found.run, started_at="2999")))
    sheet = compare.read_sheet(tmp_path)
    assert [(line.row, line.n) for line in sheet.lines] == [("none", 2)]
    assert sheet.left_out == len(plan.jobs)
    said = plan.folder.glob("*--infeasible.json")
    assert len(sheet.infeasible) == len(list(said)) > 0
    schema.write_result(newest, dataclasses.replace(found, model=dataclasses.replace(found.model, layers=9)))
    newest_alone = tmp_path / "alone"
    newest_alone.mkdir()
    for path in (newest, *tmp_path.glob("*--infeasible.json")):
        (newest_alone / path.name).write_bytes(path.read_bytes())
    assert compare.read_sheet(newest_alone).infeasible == []  # said of another depth


def test_trained_folders_are_methods_of_one_table_and_new_weights_are_new_runs(recipe, model, tmp_path):
    options: dict[str, object] = {"prune.first_layer": 0, "prune.cutoff_layer": 3, "think.max_new_tokens": 3}
    options |= {"prune.vision_keep": 0.4, "prune.cache_policy": "progressive"}
    sets = [f"{path}={value}" for path, value in options.items()]
    dare = recipes.read("dare-lh", [*sets, "trained=null"])

    def train(seed):
        with recipes.equip(model, dare) as (routed, _):
            pruner = routed.controller.pruner
            with torch.no_grad():
                for rows in pruner.router.values():
                    rows.weight.normal_(generator=torch.Generator().manual_seed(seed))
            pruner.export()
            routed.save_pretrained(tmp_path / "router")

    train(1)
    named = {"recipe": "dare-lh", "router": str(tmp_path / "router"), "set": options}
    methods = json.dumps(
        {"none": {"set": {"think.max_new_tokens": 3}}, "mine": named, "append": {**named, "set": {**options, **APPEND}}}
    )
    chosen = grid.read(str(recipe), [f"methods={methods}", "budget=own", "seeds=[0]"], ["none", "mine", "append"])
    plan = suite.Suite.plan(chosen, model, tmp_path / "ablate")
    suite.run(plan, model, "test")
    lines = {line.row: line for line in compare.read_sheet(tmp_path / "ablate").lines}
    assert set(lines) == {"none", "mine", "append"}
    assert (lines["mine"].budget.vision, lines["mine"].budget.text) == (0.4, 0.7)
    assert lines["mine"].results[0].method.config["prune"]["cache_policy"] == "progressive"
    assert lines["mine"].results[0].model.trained == str(tmp_path / "router")
    control = schema.read_result(plan.folder / lines["mine"].results[0].method.control)
    assert control.method.config["prune"]["scorer"] == "random"
    assert control.cost.v_eff == lines["mine"].results[0].cost.v_eff
    assert control.cost.kv_bytes_prefill == lines["mine"].results[0].cost.kv_bytes_prefill
    train(2)
    again = suite.Suite.plan(chosen, model, tmp_path / "ablate")
    assert len(again.left()) == len(plan.jobs) - 1  # all but `none`


def test_a_folder_without_results_says_so(tmp_path):
    with pytest.raises(InputError, match="no result files; run the bench"):
        compare.read_sheet(tmp_path)


def test_the_command_narrows_runs_and_ends_in_one_line_of_json(recipe, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    given = {
        "recipe": str(recipe), "model": "", "tasks": "colours", "methods": "none,random", "budgets": "0.5",
        "seeds": "0", "n": 2, "jobs": 1, "out": tmp_path, "dry": False, "tables": False, "set_": ["text=[1.0]"],
        "json_": True,
    }  # fmt: skip
    bench(**{**given, "dry": True, "json_": False})
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert not list(tmp_path.iterdir())
    bench(**given)
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    assert (json.loads(line)["runs"], json.loads(line)["made"]) == (2, 2)
    assert "[2/2] colours s0 random-v50-t100" in printed.err
    bench(**{**given, "tables": True})
    assert json.loads(capsys.readouterr().out)["made"] == 0


@pytest.mark.parametrize("change", [{"device": "cuda"}, {"dtype": "bfloat16"}])
def test_another_device_or_dtype_is_another_run_and_the_usual_ones_keep_their_names(recipe, model, tmp_path, change):
    usual, other = (grid.read(str(recipe), [f"{k}={v}" for k, v in set_.items()]) for set_ in ({}, change))
    names = [{job.file for job in suite.Suite.plan(each, model, tmp_path).jobs} for each in (usual, other)]
    assert names[0].isdisjoint(names[1])
    said = grid.read(str(recipe), ["device=cpu", "min_hops=0"])
    assert {job.file for job in suite.Suite.plan(said, model, tmp_path).jobs} == names[0]


@pytest.mark.slow
def test_several_processes_write_what_one_writes(recipe, model, done, tmp_path):
    """Worker processes know no `colours`; the bundled task and model serve."""
    sets = ["tasks=[frozenlake]", "model=tiny", "n=4", "seeds=[0]", "vision=[0.5]", "text=[1.0]"]
    chosen = grid.read(str(recipe), sets, ["none", "random"])
    tiny = load("tiny")
    for jobs, name in ((1, "one"), (2, "two")):
        suite.run(suite.Suite.plan(chosen, tiny, tmp_path / name), tiny, "test", jobs)
    for path in (tmp_path / "one").glob("*.json"):
        one, two = schema.read_result(path), schema.read_result(tmp_path / "two" / path.name)
        assert dataclasses.replace(two, run=one.run) == one


def test_a_row_that_prunes_nothing_is_compared_with_none_and_not_taken_for_it(done, tmp_path):
    plan, _, _ = done
    found = [schema.read_result(path) for path in plan.files()]
    for i, none in enumerate([r for r in found if r.method.row == "none"]):
        schema.write_result(tmp_path / f"none-{i}.json", none)
        method = dataclasses.replace(none.method, row="z-latent", think="coconut")
        cost = dataclasses.replace(none.cost, flops_answer=2 * none.cost.flops_answer, ar_steps=1.0)
        schema.write_result(tmp_path / f"other-{i}.json", dataclasses.replace(none, method=method, cost=cost))
    none, other = compare.read_sheet(tmp_path).lines
    assert (none.row, none.flops, none.to_none) == ("none", 1.0, None)
    assert (other.row, other.flops, other.ar_steps) == ("z-latent", 2.0, 1.0)
    assert other.to_none is not None
    assert other.to_none.diff == 0
    page = report._section(compare.read_sheet(tmp_path), tmp_path, "mini")
    assert "| AR steps |" in page
