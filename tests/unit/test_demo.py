"""The demo on a random model: its rows are counted from its answers, its two files are whole or not there."""

import json
from dataclasses import asdict

import pytest
from pairs import write_pair, write_rater, write_recipe

from mmroute import demo, recipe

pytestmark = pytest.mark.usefixtures("short")


@pytest.fixture(scope="module")
def short():
    """A few tokens and one round: what a random model writes is of no interest."""
    read = recipe.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "read", lambda name: read(name, ["think.max_new_tokens=3"]))
        for name, value in (("ROUNDS", 1), ("WARMUP", 0), ("FORCED_TOKENS", 2)):
            patch.setattr(demo, name, value)
        yield


RECIPES = ("none", "schedule")
"""Trained routers fit the bundled model only."""


@pytest.fixture(scope="module")
def ran(short, tiny_folder):
    said = []
    folder = str(tiny_folder("qwen2_5_vl"))
    rows, views = demo.run(n=4, batch=3, model=folder, say=said.append, recipes=RECIPES)
    return rows, views, said


def test_every_recipe_has_a_row_alone_and_in_batches_with_ratios_to_unrouted(ran):
    rows, _, said = ran
    assert [(r.recipe, r.batch) for r in rows] == [("none", 1), ("schedule", 1), ("none", 3), ("schedule", 3)]
    for row in rows:
        assert row.n == 4
        assert row.accuracy == row.correct / 4
        assert row.ci95[0] <= row.accuracy <= row.ci95[1]
        assert row.same_as_alone == 4
        assert row.prefill_ratio.n == 1
    assert rows[0].flops_ratio == rows[0].kv_ratio == rows[0].keep["vision"] == 1
    assert rows[1].flops_ratio < 1
    assert rows[1].kv_ratio < 1
    assert rows[1].keep["vision"] < 0.8
    assert rows[1].keep["text"] == 1
    assert rows[3].kv_ratio == rows[1].kv_ratio
    # What choosing costs a batch is shared out by positions that came, not by those its probe read.
    assert rows[3].flops_ratio == pytest.approx(rows[1].flops_ratio, rel=1e-6)
    assert len(said) == 3


def test_the_page_shows_the_longest_item_of_each_task_under_each_recipe(ran):
    _, views, _ = ran
    assert [(v.title, v.recipe) for v in views] == [(t, r) for r in reversed(RECIPES) for t in demo.TASKS]
    assert all(len(v.relevant) >= 2 and v.gold for v in views)


def test_both_files_are_written_beside_and_renamed(ran, tmp_path, monkeypatch):
    rows, views, _ = ran
    out = tmp_path / "new"
    assert demo.write(rows, views, out) == (out / "demo.json", out / "demo.html")
    data = json.loads((out / "demo.json").read_text())
    assert data["schema"] == "demo/1"
    assert [row["recipe"] for row in data["rows"]] == [row.recipe for row in rows]
    assert data["rows"][1]["accuracy"] == rows[1].accuracy
    assert data["recipes"]["schedule"]["prune"]["name"] == "schedule"
    before = (out / "demo.html").read_bytes()

    def fails(views):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo.page, "render", fails)
    with pytest.raises(OSError, match="No space"):
        demo.write(rows, views, out)
    assert (out / "demo.html").read_bytes() == before
    assert sorted(p.name for p in out.iterdir()) == ["demo.html", "demo.json"]


def test_where_no_pair_is_bundled_one_line_says_so(tmp_path):
    said = []
    path = write_recipe(tmp_path, draft="absent-draft", target="tiny", rater="absent-rater")
    assert demo.gate(4, said.append, str(path)) is None
    assert said == [
        "no rows of the gate: absent-draft, absent-rater not bundled; `mmroute train prp --help` says how to make them"
    ]


def test_a_pair_with_its_rater_gets_its_rows(tmp_path):
    write_pair(tmp_path)
    said = []
    found = demo.gate(10, said.append, str(write_recipe(tmp_path, rater=str(write_rater(tmp_path)))))
    assert (found.n, found.budget, len(said)) == (10, None, 1)
    assert 0 <= found.target_share <= 1
    assert 0 < found.cost_ratio_draft < 2
    _, path = demo.write([], [], tmp_path, {"gate": asdict(found)})
    assert json.loads((tmp_path / "demo.json").read_text())["gate"]["target_share"] == found.target_share
    assert path.exists()
