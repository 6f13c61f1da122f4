"""The engine benchmark on a model small enough for tests: counts and bytes, never seconds."""

import dataclasses
import json

import pytest
import torch

from mmroute.bench import engine, engine_cases, engine_schema, schema

SMALL = engine_cases.Stack(layers=2, hidden=32, mlp=48, heads=4, vocab=700)
RUN = schema.run_here("test", "", True, "", 0.0)


def small(case: engine_cases.Case) -> engine_cases.Case:
    """The same case at 1/16 of its lengths."""
    lengths = tuple(n // 16 for n in case.lengths)
    return dataclasses.replace(case, stack=SMALL, lengths=lengths, num_vision=case.num_vision // 16)


@pytest.mark.parametrize("case", engine.CASES, ids=lambda case: case.name)
def test_every_case_caches_exactly_what_it_keeps(case, tmp_path):
    raw = engine.measure_cases([small(case)], rounds=2, warmup=1)[case.name]
    result = engine.result_of(small(case), [raw], RUN)
    assert result.kv_bytes == result.kv_bytes_estimate
    assert (result.kv_bytes < result.stock_kv_bytes) == (case.vision_keep < 1 and case.what != "train")
    assert result.ratio["n"] == 2
    schema.write_result(tmp_path / "case.json", result)
    assert engine_schema.read_engine(tmp_path / "case.json") == result


def test_goals_over_the_ideal_scale_with_the_flop_ratio():
    case = small(engine.CASES[1])
    result = engine.result_of(case, [engine.Raw([1.0], [2.0], 1, 1, 1)], RUN)
    assert result.goal == pytest.approx(1.06 * result.flop_ratio)
    assert 0.3 < result.flop_ratio < 0.6


def test_the_headline_flop_ratio_is_the_promised_one():
    assert engine.CASES[1].flop_ratio() == pytest.approx(0.432, abs=0.001)


def test_a_padded_stock_batch_is_counted_as_the_mask_makes_it_run():
    """Every pair of 768 columns in each row, padding included; the routed rows attend causally to what they keep."""
    case, shape = engine.CASES[3], engine.CASES[3].stack.shape
    D, KV, F = shape.hidden, shape.kv_heads * shape.head_dim, shape.mlp
    position = 2 * D * D + 2 * D * KV + 3 * D * F
    stock = 4 * (768 * position + 2 * D * 768 * 768)
    kept = [79 + -(-(n - 196) * 7 // 10) for n in case.lengths]
    ours = sum(n * position + 2 * D * n * (n + 1) // 2 for n in kept)
    assert case.flop_ratio() == pytest.approx(ours / stock)
    assert case.flop_ratio() < 0.34


def test_a_goal_in_microseconds_is_over_the_stock_time():
    case = next(c for c in engine.CASES if c.over_stock_us)
    result = engine.result_of(case, [engine.Raw([1.0], [0.002], 1, 1, 1)], RUN)
    assert result.goal == pytest.approx(1 + 12e-6 * 12 / 0.002)


@pytest.mark.parametrize("executor", ["dense", "physical"])
def test_training_routes_at_the_rates_of_its_name_in_every_layer(executor):
    case = small(next(c for c in engine.CASES if c.executor == executor))
    routed = engine._attached(engine_cases.build(SMALL, "cpu"), case)
    engine._Train(routed.model, case, "cpu")()
    ((text, vision, _),) = case.new
    for layer in routed.trace.calls[0].layers:
        assert layer.ran == [[-(-text * 7 // 10), -(-vision * 4 // 10), 0]]
    assert all(p.grad is not None for p in routed.parts.prune.router.parameters())


def test_rounds_of_several_processes_are_pooled():
    raws = [engine.Raw([1.0, 2.0], [2.0, 2.0], 8, 16, 8), engine.Raw([3.0], [2.0], 8, 16, 8)]
    result = engine.result_of(engine.CASES[0], raws, RUN)
    assert (result.ratio["min"], result.ratio["median"], result.ratio["max"], result.ratio["n"]) == (0.5, 1.0, 1.5, 3)
    assert result.setting["processes"] == 2


def test_cases_of_one_stock_model_are_timed_together():
    assert [[case.name for case in cases] for cases in engine_cases.groups(engine.CASES)] == [
        ["prefill-1024-keep-1-1", "prefill-1024-keep-.4-.7", "prefill-1024-keep-.4-.4"],
        ["batch-4-padded-keep-.4-.7"],
        ["decode-1024-keep-1-1", "decode-1024-keep-.4-.7"],
        ["decode-64-small-keep-1-1"],
        ["train-dense-keep-.4-.7", "train-physical-keep-.4-.7"],
    ]


def test_padded_rows_end_where_the_batch_ends():
    case = small(engine.CASES[3])
    batch = engine_cases.prompt(case, "cpu")
    assert batch["attention_mask"].sum(1).tolist() == list(case.lengths)
    assert batch["attention_mask"][:, -1].all()
    real = batch["attention_mask"].bool()
    assert ((batch["input_ids"] == engine_cases.IMAGE) & real).sum(1).tolist() == [case.num_vision] * len(case.lengths)


def test_peak_memory_of_the_routed_run_is_measured():
    before = torch.get_num_threads()
    try:
        assert engine.measure_peak(small(engine.CASES[0]), "routed") >= 0
    finally:
        torch.set_num_threads(before)


def test_the_card_names_what_was_missed():
    result = engine.result_of(engine.CASES[0], [engine.Raw([1.0], [2.0], 8, 16, 8)], RUN)
    slow = dataclasses.replace(result, ratio={**result.ratio, "median": 9.0})
    wrong = dataclasses.replace(result, ratio={**result.ratio, "median": 0.5}, kv_bytes=1)
    assert "MISSED" in engine.card([slow])
    assert "not as counted" in engine.card([wrong])
    assert not wrong.reached


def test_the_command_writes_one_file_per_case_and_ends_with_one_json_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "CASES", tuple(small(case) for case in engine.CASES))
    engine.main(out=tmp_path, rounds=1, warmup=0, processes=0, memory=False)
    assert len(list(tmp_path.glob("*.json"))) == len(engine.CASES)
    for path in tmp_path.glob("*.json"):
        engine_schema.read_engine(path)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(last) == {case.name for case in engine.CASES}
