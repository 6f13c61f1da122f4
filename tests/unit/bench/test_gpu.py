"""The GPU benchmark on a CPU, with a model small enough for tests: counts, bytes and files, never seconds."""

import dataclasses
import json

import pytest
import torch

from mmroute import cost
from mmroute.bench import engine_cases, engine_schema, gpu, schema

SMALL = engine_cases.Stack(layers=2, hidden=32, mlp=48, heads=4, vocab=700)
RUN = schema.run_here("test", "", True, "", 0.0)
MACHINE = schema.machine_here("cpu", "float32", "sdpa")


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "MOST_ROUNDS", 1)


def small(**changed: int) -> gpu.Case:
    return dataclasses.replace(gpu.Case("3b", SMALL, context=128, batch=2, itemsize=4), **changed)


def test_every_run_of_a_case_stores_and_generates_what_is_counted(tmp_path):
    case = small()
    measured = gpu.measure(engine_cases.build(SMALL, "cpu"), case, 60, "cpu")
    assert list(measured.runs) == ["stock", "one-call", "keep-1-1", "keep-4-7"]
    full, cut = gpu.results_of(case, measured, RUN, MACHINE)
    assert full.kv_bytes == full.kv_bytes_estimate == full.stock_kv_bytes == case.shape.layers * 128 * 2 * 2 * 2 * 8 * 4
    assert cut.kv_bytes == cut.kv_bytes_estimate < cut.stock_kv_bytes
    assert cut.prefill.ratio["n"] == cut.decode.ratio["n"] == cut.one_call_ratio["n"] == 1
    assert (full.prefill_flop_ratio, full.decode_flop_ratio) == (1, 1)
    assert 0.3 < cut.prefill_flop_ratio < 0.6
    assert cut.peak_memory_bytes is None
    schema.write_result(tmp_path / "case.json", cut)
    assert engine_schema.read_gpu(tmp_path / "case.json") == cut


def test_stock_and_routed_share_their_weights_and_only_one_is_routed():
    model = engine_cases.build(SMALL, "cpu")
    runs = gpu.sessions(model, small(), "cpu")
    bases = [session.model.model for session in runs.values()]
    pointers = {tuple(p.data_ptr() for p in base.language_model.parameters()) for base in bases}
    assert len(pointers) == 1
    routed = ["forward" in base.language_model.layers[0].__dict__ for base in bases]
    assert routed == [False, False, True, True]


def test_the_planned_flops_are_those_of_what_ran():
    case = small()
    session = gpu.sessions(engine_cases.build(SMALL, "cpu"), case, "cpu")["keep-4-7"]
    session()
    ran, planned = cost.estimate_flops(session.model.__dict__["_mmroute"].trace), case.flops(0.4, 0.7)
    assert (ran.prefill, ran.decode) == (planned.prefill, planned.decode)


def test_a_large_case_runs_the_main_keep_rate_and_says_what_it_left_out(monkeypatch):
    monkeypatch.setattr(gpu, "LARGE", 100)
    case = small()
    measured = gpu.measure(engine_cases.build(SMALL, "cpu"), case, 0, "cpu")
    (cut,) = gpu.results_of(case, measured, RUN, MACHINE)
    assert list(measured.runs) == ["stock", "keep-4-7"]
    assert cut.one_call_ratio is None
    assert "too large" in cut.notes[-1]


def test_a_slow_round_counts_alone_and_says_so(monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_ROUNDS", 0)
    case = small(context=32, batch=1)
    measured = gpu.measure(engine_cases.build(SMALL, "cpu"), case, 0, "cpu")
    assert not measured.warmed
    assert "no warm-up" in gpu.results_of(case, measured, RUN, MACHINE)[0].notes[1]


def test_large_cases_come_last_and_the_last_model_built_serves_first():
    every = [case.name for case in gpu.cases(gpu.SIZES, (2048, 32768), (1, 8))]
    assert every == [
        "3b-2048-batch-1",
        "3b-2048-batch-8",
        "3b-32768-batch-1",
        "7b-2048-batch-1",
        "7b-2048-batch-8",
        "7b-32768-batch-1",
        "7b-32768-batch-8",
        "3b-32768-batch-8",
    ]


def test_the_sizes_are_those_of_the_published_models():
    parameters = {name: cost.position_macs(stack.shape) * stack.layers for name, stack in gpu.SIZES.items()}
    assert parameters["3b"] == pytest.approx(2.77e9, rel=0.01)
    assert parameters["7b"] == pytest.approx(6.53e9, rel=0.01)


class Ticking:
    """A clock that goes on by one second whenever it is read."""

    now = 0.0

    def read(self) -> float:
        self.now += 1
        return self.now


def _command(monkeypatch, tmp_path, **options):
    monkeypatch.setattr(gpu, "SIZES", {"3b": SMALL, "7b": SMALL})
    cases = gpu.cases
    monkeypatch.setattr(gpu, "cases", lambda sizes, contexts, batches: cases(sizes, [n // 64 for n in contexts], [1]))
    gpu.main(out=tmp_path, device="cpu", **options)


@pytest.mark.slow
def test_the_command_writes_a_file_per_case_and_ends_with_one_json_line(monkeypatch, tmp_path, capsys):
    _command(monkeypatch, tmp_path, quick=True, seconds=60, commit="abc")
    files = {path.stem for path in tmp_path.glob("*.json")}
    assert files == {f"3b-{n}-batch-1-{keep}" for n in (32, 128) for keep in gpu.KEEPS}
    assert {engine_schema.read_gpu(path).run.dirty for path in tmp_path.glob("*.json")} == {
        schema.commit_of_source()[1]
    }
    card, line = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert "of one call" in card
    assert set(json.loads(line)) == files


@pytest.mark.slow
def test_a_copy_without_a_checkout_takes_the_commit_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(schema, "commit_of_source", lambda: ("", True))
    _command(monkeypatch, tmp_path, quick=True, seconds=60, commit="abc")
    runs = [engine_schema.read_gpu(path).run for path in tmp_path.glob("*.json")]
    assert {(run.commit, run.dirty) for run in runs} == {("abc", False)}


@pytest.mark.slow
def test_what_does_not_fit_the_memory_or_the_time_is_named_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    measure = gpu.measure

    def full(model, case, seconds, device):
        if case.size == "7b":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(model, case, seconds, device)

    monkeypatch.setattr(gpu, "measure", full)
    monkeypatch.setattr(gpu, "WALL", Ticking())
    _command(monkeypatch, tmp_path, seconds=1000)
    said = capsys.readouterr().err
    assert "7b-32-batch-1: not measured: does not fit" in said
    assert {path.name.partition("-")[0] for path in tmp_path.glob("*.json")} == {"3b"}


def test_a_case_that_would_outlast_the_time_is_not_begun(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "WALL", Ticking())
    _command(monkeypatch, tmp_path, seconds=12)
    assert "raise --seconds" in capsys.readouterr().err
    assert 0 < len(list(tmp_path.glob("*.json"))) < 12
