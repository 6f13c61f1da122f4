"""The engine benchmark on a model small enough for tests: counts and bytes, never seconds."""

import dataclasses
import json

import pytest
import torch

from mmroute.bench import engine, schema

SMALL = engine.Stack(layers=2, hidden=32, mlp=48, heads=4, vocab=700)
RUN = schema.run_here("test", "", True, "", 0.0)


def small(case: engine.Case) -> engine.Case:
    """The same case at 1/16 of its lengths."""
    lengths = tuple(n // 16 for n in case.lengths)
    return dataclasses.replace(case, stack=SMALL, lengths=lengths, num_vision=case.num_vision // 16)


@pytest.mark.parametrize("case", engine.CASES, ids=lambda case: case.name)
def test_every_case_caches_exactly_what_it_keeps(case, tmp_path):
    (result,) = engine.measure_cases([small(case)], rounds=2, warmup=1, run=lambda: RUN, memory=False)
    assert result.kv_bytes == result.kv_bytes_estimate
    assert (result.kv_bytes < result.stock_kv_bytes) == (case.vision_keep < 1)
    assert result.ratio["n"] == 2
    schema.write_result(tmp_path / "case.json", result)
    assert schema.read_engine(tmp_path / "case.json") == result


def test_goals_over_the_ideal_scale_with_the_flop_ratio():
    case = small(engine.CASES[1])
    (result,) = engine.measure_cases([case], rounds=1, warmup=0, run=lambda: RUN, memory=False)
    assert result.goal == pytest.approx(1.06 * result.flop_ratio)
    assert 0.3 < result.flop_ratio < 0.6


def test_the_headline_flop_ratio_is_the_promised_one():
    case = engine.CASES[1]
    stack = case.stack
    shape = engine.Shape(
        hidden=stack.hidden,
        layers=stack.layers,
        heads=stack.heads,
        kv_heads=stack.kv_heads,
        head_dim=stack.hidden // stack.heads,
        mlp=stack.mlp,
        vocab=stack.vocab,
        itemsize=4,
    )
    assert case.flop_ratio(shape) == pytest.approx(0.432, abs=0.001)


def test_padded_rows_end_where_the_batch_ends():
    case = small(engine.CASES[3])
    batch = engine.prompt(case, "cpu")
    assert batch["attention_mask"].sum(1).tolist() == list(case.lengths)
    assert batch["attention_mask"][:, -1].all()
    real = batch["attention_mask"].bool()
    assert ((batch["input_ids"] == engine.IMAGE) & real).sum(1).tolist() == [case.num_vision] * len(case.lengths)


def test_peak_memory_of_the_routed_run_is_measured():
    before = torch.get_num_threads()
    try:
        assert engine.measure_peak(small(engine.CASES[0]), "routed") >= 0
    finally:
        torch.set_num_threads(before)


def test_the_card_names_what_was_missed():
    (result,) = engine.measure_cases([small(engine.CASES[0])], rounds=1, warmup=0, run=lambda: RUN, memory=False)
    slow = dataclasses.replace(result, ratio={**result.ratio, "median": 9.0})
    wrong = dataclasses.replace(result, ratio={**result.ratio, "median": 0.5}, kv_bytes=1)
    assert "MISSED" in engine.card([slow])
    assert "not as counted" in engine.card([wrong])
    assert not wrong.reached


def test_the_command_writes_one_file_per_case_and_ends_with_one_json_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "CASES", tuple(small(case) for case in engine.CASES))
    engine.main(out=tmp_path, rounds=1, warmup=0, memory=False)
    assert len(list(tmp_path.glob("*.json"))) == len(engine.CASES)
    for path in tmp_path.glob("*.json"):
        schema.read_engine(path)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(last) == {case.name for case in engine.CASES}
