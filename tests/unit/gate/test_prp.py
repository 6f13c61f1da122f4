"""The rater on a small random draft: it costs one position, changes nothing, is the same alone, batched and saved."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmroute import hub
from mmroute.backbones.images import prepare
from mmroute.backbones.load import load
from mmroute.engine.attach import attach
from mmroute.errors import CheckpointMismatch, ConfigError
from mmroute.gate._suffix import Suffix
from mmroute.gate.base import Evidence, Query
from mmroute.gate.prp import Prp, Seat, bucket_prob
from mmroute.session import Session
from mmroute.tasks._mixture import Part, draw_mixture
from mmroute.tasks._texts import VOCABULARY
from mmroute.train import rating
from mmroute.train.folder import write_folder
from mmroute.train.prompts import Prompts, chats_of
from mmroute.train.prp import fit
from mmroute.train.prp_config import PrpConfig
from mmroute.train.rollouts import roll_out
from mmroute.train.small_model import Shape, build

DRAFT = Shape(hidden=64, layers=3, heads=2, kv_heads=1, mlp=96, vision_hidden=32, vision_heads=2, vision_mlp=32)
MIX = [
    Part(task="frozenlake:nano", share=2, sizes=(3, 4)),
    Part(task="frozenlake:nano", name="hopeless", share=1, fog="decisive"),
    Part(task="frozenlake:nano", name="fog", share=1, fog="harmless"),
]


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("draft") / "model"
    write_folder(folder, build(DRAFT, VOCABULARY, 0), "", {})
    return load(folder, dtype="float32")


@pytest.fixture(scope="module")
def chats(draft: Any) -> list:
    return chats_of(draft, draw_mixture(MIX, 12, "test"), hub.load("think", "text"))


@pytest.fixture
def gate(draft: Any) -> Prp:
    made = Prp().bind(draft)
    assert isinstance(made.reader, Suffix)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in made.reader.parameters():  # fresh weights rate everything alike
            p.add_(0.3 * torch.randn(p.shape, generator=draw))
    return made


def session(routed: Any, chats: list) -> Session:
    made = Session(routed, reserve=8)
    made.append(prepare(routed.model, routed.processor, chats))
    return made


def contents(made: Session) -> list[torch.Tensor]:
    return [
        t[:, :, :n].clone()
        for layer in made.cache.layers
        for n in [max(layer.lengths)]
        for t in (layer.keys, layer.values)
    ]


@pytest.mark.parametrize("prune", [None, "fastv", "snapkv"])
def test_rating_leaves_cache_trace_and_answers_as_they_were(
    draft: Any, chats: list, gate: Prp, prune: str | None
) -> None:
    pruner = hub.load("prune", prune) if prune else None
    with attach(draft, prune=pruner) as routed:
        made = session(routed, chats)
        before, calls, seen = contents(made), len(made.cache.trace.calls), made.cache.seen
        rated = gate.rate_session(made)
        assert (len(made.cache.trace.calls), made.cache.seen) == (calls, seen)
        for a, b in zip(before, contents(made), strict=True):
            assert torch.equal(a, b)
        plain, none = roll_out(routed, chats, max_new_tokens=12)
        gated, _ = roll_out(routed, chats, max_new_tokens=12, rater=gate)
        assert none is None
        assert [r.ids for r in plain] == [r.ids for r in gated]
        assert [r.stats for r in plain] == [r.stats for r in gated]
    assert len(np.unique(rated.score.round(6))) > 6  # and it does tell the prompts apart


def test_a_batch_of_ratings_is_its_singles_and_what_training_sees(draft: Any, chats: list, gate: Prp) -> None:
    with attach(draft) as routed:
        batched = gate.rate_session(session(routed, chats))
        singles = [gate.rate_session(session(routed, [chat])) for chat in chats]
    np.testing.assert_allclose(batched.draft, [s.draft[0] for s in singles], atol=1e-5)
    prompts = Prompts.read(draft, chats, batch=5)
    probs = prompts.probs(gate, batch=7).numpy()
    np.testing.assert_allclose(probs[:, 0], batched.draft_probs, atol=1e-5)
    np.testing.assert_allclose(probs[:, 1], batched.target_probs, atol=1e-5)


@pytest.mark.parametrize("after", [1, 3, 40])
def test_a_rating_after_some_tokens_is_the_same_alone_batched_and_in_training(
    draft: Any, chats: list, gate: Prp, after: int
) -> None:
    late = Prp(decide_after=after).bind(draft)
    late.reader = gate.reader
    assert (late.needs, late.steps) == ("early", after)
    with attach(draft) as routed:
        plain, _ = roll_out(routed, chats, max_new_tokens=12)
        batched, rated = roll_out(routed, chats, max_new_tokens=12, rater=late)
        singles = [roll_out(routed, [chat], max_new_tokens=12, rater=late)[1] for chat in chats]
    assert [r.ids for r in batched] == [r.ids for r in plain]
    assert rated is not None
    np.testing.assert_allclose(rated.draft, [one.draft[0] for one in singles], atol=1e-5)
    if after < 12:  # else the answers are cut before: training reads on
        probs = Prompts.of(late, chats, batch=5).probs(late, batch=7).numpy()
        np.testing.assert_allclose(probs[:, 0], rated.draft_probs, atol=1e-5)
    before = gate.ratings(Prompts.read(draft, chats).probs(gate), 20)
    assert np.abs(before.draft - rated.draft).max() > 1e-3


def test_words_are_written_before_the_first_thought() -> None:
    with pytest.raises(ConfigError, match="decide_after is 0"):
        Prp(form="tokens", decide_after=4)


def test_evidence_is_rated_by_seat(draft: Any, chats: list, gate: Prp) -> None:
    with attach(draft) as routed:
        first, second = session(routed, chats[:3]), session(routed, chats[3:5])
        seats = [Seat(first, 2), Seat(second, 0), Seat(first, 0)]
        rated = gate.rate([Evidence(Query(str(i)), session=seat) for i, seat in enumerate(seats)])
        one, two = gate.rate_session(first), gate.rate_session(second)
    np.testing.assert_array_equal(rated.score, [one.score[2], two.score[0], one.score[0]])
    assert rated.target_probs is not None
    assert rated.target_probs.shape == (3, 10)


def test_a_rating_costs_one_step_and_its_flops_are_those_counted(draft: Any, chats: list, gate: Prp) -> None:
    with attach(draft) as routed:
        made = session(routed, chats[:1])
        rated = gate.rate_session(made)
    prompts = Prompts.read(draft, chats[:1])
    assert isinstance(gate.reader, Suffix)
    gate.reader.requires_grad_(False)  # the counter's hooks cannot bear parameters under no_grad
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        prompts.rate(gate, torch.arange(1))
    # the counter sees no fused attention on the CPU: one query against 1 + N keys, twice, in every layer
    unseen = 4 * 3 * 2 * 32 * (int(prompts.mask.sum()) + 1)
    assert rated.overhead.flops == counter.get_total_flops() + unseen
    assert (rated.overhead.calls, rated.overhead.tokens_out) == (1, 1)


def labels(n: int, prompts: Prompts) -> np.ndarray:
    """Something the prompt shows: its length."""
    length = prompts.mask.sum(1).numpy()
    long = (length > np.median(length)).astype(float)
    return np.stack([1 - long, np.full(n, 0.8)], 1)


@pytest.mark.parametrize("objective", ["all_action", "grpo", "ce"])
def test_training_learns_what_prompts_show_and_touches_no_weight_of_the_draft(draft: Any, objective: str) -> None:
    chats = chats_of(draft, draw_mixture(MIX, 96, "val"), hub.load("think", "text"))
    prompts = Prompts.read(draft, chats)
    before = {name: value.clone() for name, value in draft.state_dict().items()}
    gate = Prp().bind(draft)
    y = labels(96, prompts)
    held = np.arange(96) % 4 == 0
    config = PrpConfig(objective=objective, batch=24, max_epochs=10, patience=10, warmup=5, lr=1e-2)
    errors = fit(gate, prompts, y, y, ~held, held, config)
    assert errors[-1] < 0.5 * errors[0]
    for name, value in draft.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.requires_grad for p in draft.parameters())
    again = Prp().bind(draft)
    assert fit(again, prompts, y, y, ~held, held, config) == errors


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_the_weights_that_stay_are_the_mean_ones_that_were_judged(draft: Any, chats: list, average: float) -> None:
    prompts = Prompts.read(draft, chats)
    gate = Prp().bind(draft)
    y = labels(12, prompts)
    held = np.arange(12) % 4 == 0
    config = PrpConfig(batch=8, max_epochs=3, lr=1e-2, warmup=1, average=average)
    errors = fit(gate, prompts, y, y, ~held, held, config)
    with torch.no_grad():
        said = rating.read(prompts.rate(gate, torch.tensor(np.flatnonzero(held))))
    known = torch.tensor(y[held], dtype=torch.float32)
    assert float(((rating.gain(said) - rating.gain(known)) ** 2).mean()) == pytest.approx(min(errors), rel=1e-5)
    other = fit(Prp().bind(draft), prompts, y, y, ~held, held, replace(config, average=0.9 - average))
    assert other != errors


def test_one_rating_is_draft_rating_learning(draft: Any, chats: list) -> None:
    prompts = Prompts.read(draft, chats)
    gate = Prp(num_ratings=1, score="draft").bind(draft)
    y = labels(12, prompts)
    held = np.arange(12) % 4 == 0
    fit(gate, prompts, y, y, ~held, held, PrpConfig(batch=8, max_epochs=2))
    rated = gate.ratings(prompts.probs(gate), 20)
    assert rated.target is None
    np.testing.assert_allclose(rated.score, 1 - rated.draft)
    with pytest.raises(ConfigError, match="needs num_ratings 2"):
        Prp(num_ratings=1)


def test_a_saved_rater_is_the_same_and_fits_its_own_draft_only(
    draft: Any, chats: list, gate: Prp, tmp_path: Path
) -> None:
    prompts = Prompts.read(draft, chats)
    raw = gate.ratings(prompts.probs(gate), 20)
    sides = [raw.draft, raw.target]
    gate.calibrate(sides, [(x > np.median(x)).astype(float) for x in sides])
    gate.facts = {"quantiles": np.linspace(-1, 1, 101).tolist(), "costs": [0.1, 1.0]}
    artifact = gate.save(tmp_path / "rater")
    back = Prp.load(tmp_path / "rater", draft)
    assert back.facts["artifact"] == artifact
    np.testing.assert_array_equal(
        back.ratings(prompts.probs(back), 20).score, gate.ratings(prompts.probs(gate), 20).score
    )
    assert back.start(0.4) == pytest.approx(0.2)
    assert back.one(gate.ratings(prompts.probs(gate), 20), 1).draft_cost == 0.1
    other = build(DRAFT, VOCABULARY, 1)
    with pytest.raises(CheckpointMismatch, match="load the draft it belongs to"):
        Prp.load(tmp_path / "rater", other)
    (tmp_path / "rater" / "rater.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointMismatch, match="not a rater"):
        Prp.load(tmp_path / "rater", draft)


def test_the_papers_order_breaks_ties_inside_a_level_by_its_probability() -> None:
    probs = torch.tensor([[[0.1, 0.9, 0.0]], [[0.4, 0.6, 0.0]], [[0.7, 0.3, 0.0]], [[0.0, 0.4, 0.6]]])
    assert bucket_prob(probs)[:, 0].argsort().tolist() == [2, 1, 0, 3]
