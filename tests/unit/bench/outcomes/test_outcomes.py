"""The outcomes table: files, hashes, kills, and pairs."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from mmroute.bench.outcomes import base
from mmroute.bench.outcomes.base import Row, content_hash, pair_up, read_rows, split_of_group, write_parquet
from mmroute.errors import ConfigError, InputError


def rows() -> list[Row]:
    out = []
    for i in range(6):
        shared = {"query_id": f"q{i}", "group": f"g{i // 2}", "task": "maze", "prompt_hash": f"h{i}", "text": f"go {i}"}
        for sample in range(2):
            lp = {"lp_mean": -0.1 * i} if i else {}
            out.append(
                Row(
                    **shared, role="draft", model="d", correct=float((i + sample) % 2), sample=sample, tokens_in=10,
                    tokens_out=5, flops=3.0, prefill_flops=1.0, stats=lp, prediction="AB"[sample], pixels=(0.5, 0.25),
                )
            )  # fmt: skip
        out.append(Row(**shared, role="target", model="t", correct=1.0, tokens_in=10, tokens_out=7, flops=20.0))
    return out


def write(path: Path, made: list[Row]) -> Path:
    path.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in made))
    return path


def test_jsonl_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    made = rows()
    assert read_rows(write(tmp_path / "a.jsonl", made)) == made
    digest = write_parquet(made, tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == made
    assert digest == content_hash(made[::-1])
    assert digest != content_hash(made[1:])
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_line_torn_by_a_kill_is_dropped_and_collected_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows())
    whole = path.read_text()
    path.write_text(whole[:-40])
    assert read_rows(path) == rows()[:-1]
    path.write_text(whole[:100] + "\n" + whole)
    with pytest.raises(InputError, match=r"a\.jsonl:1: not JSON"):
        read_rows(path)


def test_a_folder_is_read_as_one_table_without_doubles(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", rows()[:9])
    write(tmp_path / "b.jsonl", rows()[6:])
    assert read_rows(tmp_path) == rows()


def test_a_pair_is_the_mean_over_samples_of_the_queries_both_answered() -> None:
    made = pair_up([row for row in rows() if (row.query_id, row.role) != ("q5", "target")])
    assert made.ids == ["q0", "q1", "q2", "q3", "q4"]
    np.testing.assert_array_equal(made.draft, 0.5)
    np.testing.assert_array_equal(made.target_cost, 20.0)
    np.testing.assert_array_equal(made.prefill_cost, 1.0)
    np.testing.assert_allclose(made.stats["lp_mean"], [np.nan, -0.1, -0.2, -0.3, -0.4])
    assert made.labels[0] == ["A", "B"]
    assert made.pair.groups == ["g0", "g0", "g1", "g1", "g2"]
    assert pair_up(rows(), "tokens").target_cost.tolist() == [17.0] * 6
    assert pair_up(rows(), "calls").draft_cost.tolist() == [1.0] * 6


def test_taking_queries_takes_every_column() -> None:
    made = pair_up(rows())
    some = made.take(np.array([False, True, False, True, False, False]))
    assert (some.ids, some.texts) == (["q1", "q3"], ["go 1", "go 3"])
    np.testing.assert_allclose(some.stats["lp_mean"], [-0.1, -0.3])
    assert len(some) == len(some.target_cost) == len(some.pixels) == 2


def test_what_cannot_be_a_pair_is_refused() -> None:
    with pytest.raises(InputError, match="one draft and one target"):
        pair_up([*rows(), dataclasses.replace(rows()[0], model="e")])
    with pytest.raises(InputError, match="no query in common"):
        pair_up([dataclasses.replace(row, query_id=row.query_id + row.role) for row in rows()])
    with pytest.raises(InputError, match="have no usd"):
        pair_up(rows(), "usd")
    with pytest.raises(ConfigError, match="one of flops"):
        pair_up(rows(), "euros")


def test_splits_follow_groups_alone_and_have_their_shares() -> None:
    names = [split_of_group(f"quad-{i}") for i in range(5000)]
    assert names == [split_of_group(f"quad-{i}") for i in range(5000)]
    # three standard errors of a share of .6 at 5000
    assert [names.count(s) / 5000 for s in ("train", "calibration", "test")] == pytest.approx(
        [0.6, 0.2, 0.2], abs=0.021
    )


def test_bad_rows_name_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"query_id": "q", "role": "judge", "model": "m", "correct": 1}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:1\.role"):
        read_rows(path)
    with pytest.raises(InputError, match="no outcomes there"):
        read_rows(tmp_path / "none.jsonl")
    assert base.SCHEMA == "outcomes/1"
