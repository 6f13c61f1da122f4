"""The timing harness on a fake clock: order, warm-ups, pairing and forced length. No test asserts real seconds."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmroute.bench import measure
from mmroute.errors import ConfigError


class FakeClock:
    """Seconds pass only when someone lets them."""

    def __init__(self):
        self.now = 0.0
        self.clock = measure.Clock("thread", lambda: self.now)

    def passes(self, seconds):
        self.now += seconds


class Head(nn.Module):
    """Answers like a Transformers model; each call takes 10 s + 1 s per position on the fake clock."""

    def __init__(self, fake):
        super().__init__()
        self.fake, self.calls, self.tower = fake, [], Tower(fake)

    def forward(self, **given):
        self.calls.append(given)
        if "pixel_values" in given:
            self.tower(given["pixel_values"])
        self.fake.passes(10 + given["input_ids"].shape[1])
        logits = torch.zeros(len(given["input_ids"]), 1, 5)
        logits[..., 3] = 1  # were 3 the end token, the loop would have to go on all the same
        return SimpleNamespace(logits=logits, past_key_values="cache")


class Tower(nn.Module):
    def __init__(self, fake):
        super().__init__()
        self.fake = fake

    def forward(self, pixels):
        self.fake.passes(100)
        return pixels


def prompt(**more):
    positions = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    return {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": mask, "position_ids": positions, **more}


def test_every_round_runs_each_case_once_in_rotated_order():
    order, fake = [], FakeClock()
    cases = {name: lambda name=name: order.append(name) for name in "abc"}
    measure.interleave(cases, rounds=3, warmup=1, clock=fake.clock, wall=fake.clock)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"


def test_warm_up_rounds_are_dropped():
    fake, took = FakeClock(), iter([50, 70, 1, 2, 3])
    timings = measure.interleave(
        {"only": lambda: fake.passes(next(took))}, rounds=3, warmup=2, clock=fake.clock, wall=fake.clock
    )
    assert timings.seconds["only"]["total"] == [1, 2, 3]
    assert timings.spread("only").n == 3


def test_ratios_are_paired_by_round():
    fake = FakeClock()
    drift = iter([1, 1, 8, 8, 2, 2])  # the machine slows down between rounds, never within one
    timings = measure.interleave(
        {"fast": lambda: fake.passes(next(drift)), "slow": lambda: fake.passes(2 * next(drift))},
        rounds=3,
        warmup=0,
        clock=fake.clock,
        wall=fake.clock,
    )
    ratio = timings.ratio("fast", "slow")
    assert (ratio.min, ratio.median, ratio.max, ratio.n) == (0.5, 0.5, 0.5, 3)


def test_a_case_may_report_parts_of_its_own():
    fake = FakeClock()
    timings = measure.interleave({"x": lambda: {"prefill": 4.0}}, rounds=2, warmup=1, clock=fake.clock)
    assert timings.seconds["x"]["prefill"] == [4.0, 4.0]


def test_threads_are_one_while_timing_and_restored_after():
    seen = []
    before = torch.get_num_threads()
    measure.interleave({"x": lambda: seen.append(torch.get_num_threads())}, rounds=1, warmup=0)
    assert seen == [1]
    assert torch.get_num_threads() == before


def test_nothing_to_time_is_refused():
    with pytest.raises(ConfigError, match="0 cases"):
        measure.interleave({}, rounds=3)
    with pytest.raises(ConfigError, match="rounds >= 1"):
        measure.interleave({"x": lambda: None}, rounds=0)


def test_spread_orders_its_values():
    found = measure.spread([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (found.min, found.median, found.max, found.n) == (1.0, 3.0, 5.0, 5)
    assert found.p10 == pytest.approx(1.4)
    assert found.p90 == pytest.approx(4.6)
    assert measure.spread([2.0]) == measure.Spread(2.0, 2.0, 2.0, 2.0, 2.0, 1)
    with pytest.raises(ConfigError, match="given none"):
        measure.spread([])


def test_prefill_and_steps_are_timed_apart_at_the_forced_length():
    fake = FakeClock()
    model = Head(fake)
    found = measure.measure_generation(model, prompt(), 6, clock=fake.clock, wall=fake.clock)
    assert len(model.calls) == 6  # the prompt gives the first token
    assert found.prefill_s == 14
    assert found.decode_s_per_token == 11
    assert found.wall_s == 14 + 5 * 11


def test_every_step_gets_explicit_positions_and_the_whole_mask():
    fake = FakeClock()
    model = Head(fake)
    measure.measure_generation(model, prompt(), 3, clock=fake.clock)
    assert [call["position_ids"].tolist() for call in model.calls[1:]] == [[[2], [4]], [[3], [5]]]
    assert [call["attention_mask"].shape[1] for call in model.calls] == [4, 5, 6]
    assert model.calls[-1]["past_key_values"] == "cache"
    assert model.calls[-1]["input_ids"].tolist() == [[3], [3]]


def test_steps_of_three_row_positions_go_on_from_the_largest():
    fake = FakeClock()
    model = Head(fake)
    rows = torch.tensor([[[0, 1, 1, 1]], [[0, 1, 1, 2]], [[0, 1, 5, 3]]])
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 4), "position_ids": rows}
    measure.measure_generation(model, batch, 2, clock=fake.clock)
    assert model.calls[1]["position_ids"].tolist() == [[[6]], [[6]], [[6]]]


def test_the_tower_is_timed_apart_from_the_prefill():
    fake = FakeClock()
    model = Head(fake)
    batch = prompt(pixel_values=torch.zeros(1))
    found = measure.measure_generation(model, batch, 2, clock=fake.clock, tower=model.tower)
    assert (found.prefill_s, found.tower_s) == (114, 100)
    assert found.parts == {"prefill": 14, "decode": 11, "tower": 100}
    assert not model.tower._forward_hooks
    assert not model.tower._forward_pre_hooks


def test_a_batch_without_positions_is_refused():
    batch = prompt()
    del batch["position_ids"]
    with pytest.raises(ConfigError, match="explicit position_ids"):
        measure.measure_generation(Head(FakeClock()), batch, 4)
    with pytest.raises(ConfigError, match="at least 2"):
        measure.measure_generation(Head(FakeClock()), prompt(), 1)


def test_realised_saving_relates_the_clock_to_the_arithmetic():
    assert measure.realised_saving(0.5, 0.4) == pytest.approx(0.5 / 0.6)
    assert measure.realised_saving(1.0, 1.0) is None


def test_peak_memory_sees_an_allocation():
    measure.reset_peak_memory()
    before = measure.peak_memory_bytes()
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])  # touched, or it would not be resident
    assert measure.peak_memory_bytes() - before > 48 * 2**20
