"""Tables that others publish, made here in their form."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmroute.bench.outcomes.load import load_outcomes
from mmroute.errors import ConfigError, InputError


def write_csv(path: Path, records: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return path


def write_parquet(path: Path, columns: dict[str, list]) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path)


def write_jsonl(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def test_mmr_bench_in_one_file_and_in_one_per_set(tmp_path: Path) -> None:
    records = [
        {"question": f"q{i}", "img_path": f"im{i // 2}.jpg", "dataset_idx": f"MathVista_{i}", "small_correct": i % 2,
         "small_cost": 0.1, "big_is_correct": "True", "big_cost": 1.5}
        for i in range(4)
    ]  # fmt: skip
    made = load_outcomes(write_csv(tmp_path / "MMR_Bench.csv", records), "mmr-bench", "small", "big")
    assert (made.unit, made.tasks[0], made.groups) == ("usd", "MathVista", ["im0.jpg", "im0.jpg", "im1.jpg", "im1.jpg"])
    np.testing.assert_array_equal(made.draft, [0, 1, 0, 1])
    np.testing.assert_array_equal(made.target_cost, 1.5)
    assert load_outcomes(tmp_path, "mmr-bench", "small", "big").ids == made.ids
    with pytest.raises(InputError, match="no column 'huge_cost'"):
        load_outcomes(tmp_path, "mmr-bench", "small", "huge")


def test_routerbench_and_its_refused_pickle(tmp_path: Path) -> None:
    records = [
        {
            "sample_id": f"s{i}",
            "prompt": "p",
            "eval_name": "mmlu",
            "a": 0.5,
            "b": 1,
            "a|total_cost": 1e-4,
            "b|total_cost": 0.01,
        }
        for i in range(3)
    ]
    made = load_outcomes(write_csv(tmp_path / "r.csv", records), "routerbench", "a", "b")
    assert (made.draft.tolist(), made.draft_cost.tolist(), made.tasks[0]) == ([0.5] * 3, [1e-4] * 3, "mmlu")
    (tmp_path / "r.pkl").write_bytes(b"\x80")
    with pytest.raises(InputError, match="a pickle runs code"):
        load_outcomes(tmp_path / "r.pkl", "routerbench", "a", "b")


def test_routellm_leaves_contaminated_prompts_out(tmp_path: Path) -> None:
    records = [{"prompt": f"p{i}", "mixtral": "True", "gpt4": "False"} for i in range(3)]
    path = write_csv(tmp_path / "gsm8k.csv", records)
    assert len(load_outcomes(path, "routellm", "mixtral", "gpt4")) == 3
    write_jsonl(tmp_path / "contaminated_prompts.jsonl", [{"eval_prompt": "p1"}])
    made = load_outcomes(path, "routellm", "mixtral", "gpt4")
    assert (made.texts, made.unit) == (["p0", "p2"], "calls")
    assert (made.draft.tolist(), made.target.tolist()) == ([1, 1], [0, 0])


@pytest.fixture
def vl_folder(tmp_path: Path) -> Path:
    ids = ["s0", "s1", "s2"]
    (tmp_path / "data/matrices").mkdir(parents=True)
    np.savez(tmp_path / "data/matrices/Y.npz", Y=np.array([[0, 1.0], [1, 1], [0, 0]]))
    np.save(tmp_path / "data/matrices/C.npy", np.array([[0.1, 2.0]] * 3))
    write_parquet(tmp_path / "data/registry/meta.parquet", {"sample_id": ids, "dataset": ["ChartQA"] * 3})
    (tmp_path / "data/registry/models.txt").write_text("small\nbig\n")
    write_jsonl(
        tmp_path / "BENCHMARKS/ChartQA/ChartQA_samples.jsonl",
        [{"sample_id": i, "prompt": f"see {i}", "assets": [{"type": "image", "path": "x.png"}]} for i in ids],
    )
    write_jsonl(tmp_path / "SPLITS/test.jsonl", [{"sample_id": "s2"}])
    write_parquet(
        tmp_path / "ORACLE/score/a.parquet",
        {"sample_id": ids * 2, "model_id": ["small"] * 3 + ["big"] * 3, "quality": [0.0, 1, 0, 1, 1, 0]},
    )
    return tmp_path


def test_vl_routerbench_by_matrices_and_by_scores(vl_folder: Path) -> None:
    made = load_outcomes(vl_folder, "vl-routerbench", "small", "big")
    assert (made.draft.tolist(), made.target.tolist()) == ([0, 1, 0], [1, 1, 0])
    assert (made.tasks[0], made.texts[1], made.splits[2], len(set(made.groups))) == ("ChartQA", "see s1", "test", 1)
    assert made.target_cost.tolist() == [2.0] * 3
    (vl_folder / "data/matrices/Y.npz").unlink()
    scores = load_outcomes(vl_folder, "vl-routerbench", "small", "big")
    assert (scores.draft.tolist(), scores.target.tolist(), scores.unit) == ([0, 1, 0], [1, 1, 0], "calls")


def test_sizes_that_do_not_fit_are_said(vl_folder: Path) -> None:
    np.save(vl_folder / "data/matrices/C.npy", np.zeros((2, 2)))
    with pytest.raises(InputError, match=r"C \(2, 2\), the registry has 3 samples and 2 models"):
        load_outcomes(vl_folder, "vl-routerbench", "small", "big")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_plain_table_with_its_routers_and_other_names(tmp_path: Path, kind: str) -> None:
    records = [
        {
            "id": f"x{i}",
            "right_small": i % 2,
            "target_correct": 1,
            "draft_cost": 1,
            "target_cost": 9,
            "score_mine": 0.5 * i,
        }
        for i in range(4)
    ]
    path = tmp_path / f"t.{kind}"
    if kind == "csv":
        write_csv(path, records)
    elif kind == "jsonl":
        write_jsonl(path, records)
    else:
        write_parquet(path, {name: [r[name] for r in records] for name in records[0]})
    made = load_outcomes(path, columns={"draft_correct": "right_small"})
    assert (made.ids, made.draft.tolist(), made.unit) == (["x0", "x1", "x2", "x3"], [0, 1, 0, 1], "usd")
    assert made.scores["mine"].tolist() == [0, 0.5, 1, 1.5]
    with pytest.raises(InputError, match="no column 'draft_correct'"):
        load_outcomes(path)


def test_bad_asks_say_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one of outcomes, table"):
        load_outcomes(tmp_path, "mmrbench")
    with pytest.raises(ConfigError, match="name a pair"):
        load_outcomes(tmp_path, "routerbench")
    path = write_csv(tmp_path / "t.csv", [{"draft_correct": 2, "target_correct": 1}])
    with pytest.raises(InputError, match="success is between 0 and 1"):
        load_outcomes(path)
