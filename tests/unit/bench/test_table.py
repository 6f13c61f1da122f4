"""Tables hold what result files hold, and say so when they do not."""

import dataclasses

import pytest
import typer
from result_samples import make_result

from mmroute.bench import report, schema, table
from mmroute.errors import ConfigError, InputError

PAGE = "# Title\n\n<!-- table:runs -->\nold\n<!-- /table -->\ntext after\n"


@pytest.fixture
def results(tmp_path):
    pruned = make_result()
    none = make_result(
        method=dataclasses.replace(pruned.method, recipe="none"),
        cost=dataclasses.replace(pruned.cost, flops_answer=34.0, kv_bytes_end=260.0),
        baseline=None,
    )
    schema.write_result(tmp_path / "results/runs/random.json", pruned)
    schema.write_result(tmp_path / "results/runs/none.json", none)
    return tmp_path / "results"


def test_the_table_shows_ratios_to_the_baseline_of_the_same_run(results):
    head, _, none, pruned = table.table_of(results / "runs").splitlines()
    assert "| none |" in none
    assert "| random |" in pruned
    assert "| 0.500 | 0.500 |" in pruned
    assert "| 0.500 [0.400, 0.600] |" in pruned
    assert "| 75.0 [30.0, 95.0] | -25.0 [-60.0, +0.0] |" in pruned
    assert head.count("|") == pruned.count("|") == none.count("|")


def test_a_baseline_of_another_run_gives_no_ratio(results):
    path = results / "runs/none.json"
    none = schema.read_result(path)
    schema.write_result(path, dataclasses.replace(none, run=dataclasses.replace(none.run, started_at="2027")))
    assert "| n/a | n/a |" in table.table_of(results / "runs").splitlines()[-1]


def test_a_baseline_of_another_task_that_started_in_the_same_second_gives_no_ratio(results):
    path = results / "runs/none.json"
    none = schema.read_result(path)
    schema.write_result(path, dataclasses.replace(none, task=dataclasses.replace(none.task, name="other-v1")))
    assert any("| n/a | n/a |" in line for line in table.table_of(results / "runs").splitlines())


def test_only_the_kinds_of_check_stand_in_a_table(results):
    path = results / "runs/random.json"
    pruned = schema.read_result(path)
    told = dataclasses.replace(
        pruned.method, checked="twin (tests/x.py), arithmetic (K = 3); not run against the release"
    )
    schema.write_result(path, dataclasses.replace(pruned, method=told))
    assert "| twin, arithmetic |" in table.table_of(results / "runs")


def test_blocks_are_filled_and_the_rest_is_left(results):
    filled = table.fill(PAGE, results)
    assert filled.startswith("# Title\n\n<!-- table:runs -->\n| task |")
    assert filled.endswith("|\n<!-- /table -->\ntext after\n")
    assert table.fill(filled, results) == filled


def test_a_block_that_is_never_closed_is_refused(results):
    with pytest.raises(ConfigError, match="1 table blocks are opened and 0"):
        table.fill("<!-- table:runs -->\n", results)


def test_check_says_when_a_page_is_out_of_date(results, tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    with pytest.raises(typer.Exit):
        table.main(page, results, check=True)
    assert "out of date" in capsys.readouterr().err
    assert page.read_text() == PAGE
    table.main(page, results)
    table.main(page, results, check=True)
    assert page.read_text() != PAGE


def test_results_of_uncommitted_source_are_refused(results):
    path = results / "runs/random.json"
    found = schema.read_result(path)
    schema.write_result(path, dataclasses.replace(found, run=dataclasses.replace(found.run, dirty=True)))
    with pytest.raises(InputError, match=r"random\.json: made from source that was not committed"):
        table.table_of(results / "runs")


def test_drawn_thoughts_have_a_line_per_recipe_and_the_unrouted_one_first(tmp_path):
    found = {"n": 200, "accuracy": 0.54, "ci95": [0.4708, 0.6077], "v_acc": 0.4183, "v_red": 0.7392, "v_ratio": 0.0883}
    found |= {"drawn_right": 0.075, "drawn_right_ci95": [0.046, 0.12], "keep": {"vision": 0.625, "text": 0.7849}}
    run = {"schema": "drawn/1", "dirty": False, "preset": "nano", "context": "markov2", "tasks": {"frozenlake": found}}
    schema.write_json(tmp_path / "a.json", {**run, "recipe": "dare", "prune": {"name": "dare"}})
    schema.write_json(tmp_path / "b.json", {**run, "recipe": "image", "prune": None})
    first, second = table.table_of(tmp_path).splitlines()[2:]
    assert "| image |" in first
    assert second == (
        "| frozenlake:nano | dare | markov2 | 0.625 / 0.785 | 7.5 [4.6, 12.0] | 0.418 | 0.739 | 0.088 "
        "| 54.0 [47.1, 60.8] | 200 |"
    )
    schema.write_json(tmp_path / "a.json", {**run, "recipe": "dare", "prune": {"name": "dare"}, "dirty": True})
    with pytest.raises(InputError, match="dare: made from source that was not committed"):
        table.table_of(tmp_path)


DRAWN = {"schema": "drawn/1", "dirty": False, "context": "accumulate", "recipe": "image", "prune": None, "tasks": {}}


def latent_time(dirty=False):
    """Three ways: one with a pair, one that others are paired with, one without memory."""
    seconds = {"median": 0.25, "p10": 0.2, "p90": 0.3}
    return {
        "schema": "latent-time/1",
        "run": {"dirty": dirty},
        "machine": {"device": "cpu"},
        "token_forwards": {"vedas": 325, "stock": 325, "reforward": 1084},
        "time_s": {"vedas": seconds, "stock": seconds, "reforward": seconds},
        "ratio": {
            "vedas/stock": {"median": 1.1, "p10": 1.0, "p90": 1.2},
            "vedas/ivtlr": {"median": 9.0, "p10": 9.0, "p90": 9.0},
            "reforward/vedas": {"median": 1.9, "p10": 1.8, "p90": 2.0},
        },
        "peak_memory_bytes": {"vedas": 24_800_000, "stock": 24_700_000, "maps": 1},
    }


def test_the_time_of_latent_steps_has_a_line_per_way_with_what_it_was_compared_with(tmp_path):
    schema.write_json(tmp_path / "a.json", latent_time())
    assert table.table_of(tmp_path).splitlines()[2:] == [
        "| vedas | cpu | 325 | 250 [200, 300] | 1.100 [1.000, 1.200] to stock | 24.8 |",
        "| stock | cpu | 325 | 250 [200, 300] | - | 24.7 |",
        "| reforward | cpu | 1084 | 250 [200, 300] | 1.900 [1.800, 2.000] to vedas | n/a |",
    ]
    schema.write_json(tmp_path / "a.json", latent_time(dirty=True))
    with pytest.raises(InputError, match="latent-time: made from source that was not committed"):
        table.table_of(tmp_path)


def test_the_page_has_folders_inside_folders_of_results_and_no_others(results):
    schema.write_json(results / "runs/pictures/a.json", DRAWN)
    schema.write_json(results / "time/a.json", latent_time())
    schema.write_json(results / "curves/a.json", {"schema": "cliff/1"})
    schema.write_json(results / "answers/weights/config.json", {"no": "schema"})  # in a folder without results
    page = report.page(results)
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "# Results",
        "## runs",
        "## runs/pictures",
        "## time",
    ]
    assert table.table_of(results / "runs/pictures") in page


def test_a_kind_without_a_table_is_refused_with_those_that_have_one(tmp_path):
    schema.write_json(tmp_path / "a.json", {"schema": "cliff/1"})
    with pytest.raises(InputError, match=r"cliff/1 has no table; kinds that have one are drawn/1, .*result/1"):
        table.table_of(tmp_path)


def test_an_empty_folder_and_mixed_kinds_are_refused(results, tmp_path):
    with pytest.raises(InputError, match="no result files"):
        table.table_of(tmp_path)
    schema.write_json(results / "runs/other.json", {"schema": "engine/1"})
    with pytest.raises(InputError, match="engine/1 and result/1"):
        table.table_of(results / "runs")


def test_a_block_without_result_files_is_empty(results):
    page = "<!-- table:never-run -->\nan old number\n<!-- /table -->\n<!-- headline -->\nold\n<!-- /headline -->\n"
    assert table.fill(page, results) == (
        "<!-- table:never-run -->\n<!-- /table -->\n<!-- headline -->\n<!-- /headline -->\n"
    )


def test_a_baseline_run_twice_stands_once(results):
    none = schema.read_result(results / "runs/none.json")
    again = dataclasses.replace(none, run=dataclasses.replace(none.run, started_at="2027"))
    schema.write_result(results / "runs/none-again.json", again)
    assert table.table_of(results / "runs").count("| none |") == 1


def test_the_headline_compares_dare_lh_with_its_baseline(results):
    found = schema.read_result(results / "runs/random.json")
    renamed = dataclasses.replace(found, method=dataclasses.replace(found.method, recipe="dare-lh"))
    schema.write_result(results / "spatial/dare-lh.json", renamed)
    page = "<!-- headline -->\n<!-- /headline -->\n"
    assert table.fill(page, results) == page  # without its baseline there is nothing to say
    schema.write_result(results / "spatial/none.json", schema.read_result(results / "runs/none.json"))
    said = table.fill(page, results).splitlines()[1]
    assert said.startswith("**50% fewer FLOPs and 50% less KV cache** on held-out maze: ")
    assert "answers 75.0% right with the recipe `dare-lh` and 75.0% unrouted" in said
