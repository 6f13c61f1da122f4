"""DARE's rates, losses and gates on made-up states: exact means, gradients where they should be and nowhere else."""

import dataclasses
import logging
import math

import pytest
import torch

from mmroute import checks, hub
from mmroute.engine.train import key_gate, update_gate
from mmroute.errors import BudgetError, ConfigError
from mmroute.prune import _borrowed
from mmroute.prune._gates import Relaxation
from mmroute.prune.dare import Dare, _tell_of_half
from mmroute.tokens import Modality, Tokens
from mmroute.trace import Shape

L = 6
OTHERS = [
    {"variant": "l"},
    {"rates": "penalty", "carry": True},
    {"rates": "bernoulli"},
    {"rates": "fixed", "gain": "tanh"},
    {"hop_table": "full", "gain": "score"},
    {"deep_vision": "threshold", "relaxation": "paper_softmax"},
    {"text_keep": 1.0, "deep_vision": "drop"},
    {"scorer": "oracle"},
    {"scorer": "random", "rates": "fixed"},
    {"scorer": "last_row", "rates": "fixed", "text_keep": 1.0},
    {"scorer": "knorm", "rates": "fixed"},
    {"scorer": "received", "rates": "fixed"},
    {"scorer": "diverse", "rates": "fixed"},
    {"decode": "threshold"},
    {"gain": "none"},
    {"cache_policy": "capped", "kv_positions": 16},
]


def made(**options):
    pruner = Dare(**options)
    pruner.fit(checks.made_up_shape(L))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in pruner.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    pruner.export()
    return pruner


def learn(pruner, layer=2, case=None):
    case = checks.made_up() if case is None else case
    pruner.train()
    site = case.site(pruner, layer, L)
    return pruner.keep(case.hidden(layer), case.tokens, site), case.tokens


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_every_way_keeps_the_contract(options):
    checks.check_pruner(hub.load("prune", "dare", **options))


def test_without_a_gain_the_same_set_runs_and_only_keys_carry_gradient():
    plain, tokens = learn(made())
    bare, _ = learn(made(gain="none"))
    assert torch.equal(bare.mask, plain.mask)
    assert torch.equal(update_gate(bare), update_gate(plain).detach())
    assert update_gate(plain).requires_grad and not update_gate(bare).requires_grad
    keys, others = key_gate(bare, tokens).value, key_gate(plain, tokens).value
    assert torch.equal(keys, others)
    gradients = [torch.autograd.grad(k.sum(), keep.logits)[0] for k, keep in ((keys, bare), (others, plain))]
    assert gradients[0].any() and torch.equal(*gradients)


def test_learned_rates_have_the_mean_they_were_asked_for():
    pruner = made(cutoff_layer=5, vision_keep=0.5, text_keep=0.8)
    pruner.rates.hop_counts.copy_(torch.tensor([[0.5, 0.3, 0.2, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]))
    rates = pruner.rates.table()
    weight = pruner.rates.hop_counts.double()
    mean = (rates.mean(2) * weight).sum(1)
    torch.testing.assert_close(mean, torch.tensor([0.8, 0.5], dtype=torch.float64), rtol=0, atol=1e-6)
    assert (rates[:, :, :2] == 1).all()
    torch.testing.assert_close(rates[Modality.VISION, :, 5], pruner.rates.deep_share[5].double().expand(8))
    rates[Modality.TEXT, 0, 3].backward()
    assert pruner.rates.theta.grad.any() and pruner.rates.beta.grad.any()


def test_a_cosine_falls_behind_the_whole_layers_and_has_its_mean():
    table = made(rates="fixed", vision_schedule="cosine", vision_keep=0.5).rates.table()[Modality.VISION, 0]
    assert table[:2].tolist() == [1, 1]
    assert float(table.mean()) == pytest.approx(0.5, abs=1e-6)
    assert (table[2:].diff() <= 0).all() and table[2] > table[3]


def test_a_schedule_is_read_from_trained_routers_and_from_a_calibration(tmp_path):
    trained = _borrowed.borrow("@dare-lh")
    for start in ({"rates": "fixed"}, {"rates": "penalty", "variant": "l"}):
        table = made(vision_schedule="@dare-lh", cutoff_layer=L, vision_keep=0.6, **start).rates
        with torch.no_grad():
            if start["rates"] == "penalty":
                assert table.theta.shape == (2, 1, L)
            found = table._start(Modality.VISION)
        rates = [trained.rate(i, L, 0, Modality.VISION) for i in range(L)]
        kept = [1.0 if rate is None else rate for rate in rates]  # a whole layer has no rate
        assert found.tolist() == pytest.approx(kept)
        assert min(kept) < 0.1 < max(kept[2:]) < 1
    recipe = tmp_path / "calibrated.yaml"
    recipe.write_text(
        "prune: {name: schedule, scorer: random, vision: [1, 1, 0.5, 0.25, 0, 0], text: [1, 0.5, 0.5, 0.5, 0.5, 0.5]}\n"
    )
    pruner = made(rates="fixed", vision_schedule=f"@{recipe}", text_schedule=f"@{recipe}")
    table = pruner.rates.table()
    assert table[Modality.VISION, 3].tolist() == [1, 1, 0.5, 0.25, 0, 0]
    assert table[Modality.TEXT, 0].tolist() == [1, 0.5, 0.5, 0.5, 0.5, 0.5]
    with pytest.raises(ConfigError, match="no routers in"):
        made(vision_schedule="@nowhere")


def test_rates_leave_room_for_what_is_protected_and_keep_their_mean():
    pruner = made()
    rates = pruner.rates
    rates.hop_counts.copy_(torch.tensor([[0.4, 0.2, 0.2, 0.2, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]))
    rates.certain.copy_(torch.tensor([[0.2, 0.4, 0.45, 0.5, 0, 0, 0, 0], [0.02] + [0] * 7]))
    with torch.no_grad():
        rates.beta.copy_(torch.tensor([[-9.0] * 7, [0.0] * 7]))  # later hops would get nothing
    table = rates.table().detach()[Modality.TEXT]
    assert (table[:4, 2:] >= rates.certain[Modality.TEXT, :4, None]).all()
    assert float((rates.hop_counts[Modality.TEXT].double() @ table.double()).mean()) == pytest.approx(0.7, abs=1e-6)


@pytest.mark.parametrize(
    "options", [{"cache_policy": "capped"}, {"kv_positions": 64}, {"kv_bytes": 10, "cache_policy": "append"}], ids=str
)
def test_a_bound_and_its_policy_go_together(options):
    with pytest.raises(ConfigError, match="cache_policy capped goes with"):
        Dare(**options)


def test_a_bound_too_small_for_anything_is_refused():
    with pytest.raises(ConfigError, match="less than 8 positions"):
        Dare(cache_policy="capped", kv_bytes=64).fit(checks.made_up_shape(L))


def test_written_text_below_the_learned_floor_skips_the_layer():
    pruner = made(decode="threshold").eval()
    pruner.floors.fill_(0.3)
    case = checks.made_up()
    site = case.site(pruner, 3, L)
    one = Tokens(*(getattr(case.tokens, f.name)[:, -1:] for f in dataclasses.fields(Tokens)))
    one = dataclasses.replace(one, valid=torch.ones_like(one.valid), protected=torch.zeros_like(one.protected))
    x = case.hidden(3)[:, -1:]
    keep = pruner.decode(x, one, site)
    assert torch.equal(keep.mask, keep.logits >= 0.3)
    assert keep.ran == [[int(runs), 0, 0] for runs in keep.mask[:, 0].tolist()]
    assert 0 < keep.mask.sum() < keep.mask.numel()
    certain = pruner.decode(x, dataclasses.replace(one, protected=torch.ones_like(one.valid)), site)
    assert certain.mask.all()


def test_floors_are_the_quantile_that_training_text_leaves_out():
    pruner = made(decode="threshold")
    case = checks.made_up()
    tokens = dataclasses.replace(case.tokens, generated=case.tokens.valid & (case.tokens.modality == Modality.TEXT))
    keep = pruner.eval().keep(case.hidden(3), case.tokens, case.site(pruner, 3, L))
    pruner.observe(tokens, {3: keep})
    share = float((keep.logits.detach()[tokens.generated] >= pruner.floors[3]).float().mean())
    assert share == pytest.approx(pruner.rates.table()[Modality.TEXT, -1, 3].item(), abs=0.1)
    assert pruner.floors[2].item() == -math.inf


def test_what_deep_layers_save_is_spent_before_the_cutoff():
    pruner = made(cutoff_layer=4)
    before = pruner.rates.table()[Modality.VISION, 0, 2:4].sum()
    pruner.rates.deep_share.fill_(0.01)
    after = pruner.rates.table()[Modality.VISION, 0, 2:4].sum()
    assert abs((after - before).item() - 2 * 0.04) < 1e-6


@pytest.mark.parametrize(
    ("options", "fault"), [({"vision_keep": 0.3}, "0.358 to"), ({"first_layer": 6}, "1.000 to 1.000")]
)
def test_a_mean_that_cannot_be_met_is_refused_with_what_can(options, fault):
    with pytest.raises(BudgetError, match=fault):
        Dare(**options).fit(Shape(8, L, 1, 1, 1, 1, 1, 4))


def test_a_pruner_serves_one_shape():
    pruner = made()
    pruner.fit(checks.made_up_shape(L))
    with pytest.raises(ConfigError, match="was made for 6 layers"):
        pruner.fit(checks.made_up_shape(7))


def test_a_schedule_needs_a_share_for_each_layer():
    with pytest.raises(ConfigError, match="3 shares for 6 layers"):
        Dare(rates="fixed", vision_schedule=[1.0, 0.5, 0.1]).fit(checks.made_up_shape(L))


def test_a_trained_router_serves_another_target_by_its_learned_shape():
    pruner = made(cutoff_layer=6)
    other = Dare(cutoff_layer=6, vision_keep=0.6)
    other.fit(checks.made_up_shape(L))
    other.load_state_dict(pruner.state_dict())
    assert abs(sum(other.rate(i, L, 0, Modality.VISION) or 1.0 for i in range(L)) / L - 0.6) < 1e-6


def test_realised_counts_are_the_rates_rounded_up():
    pruner = made().eval()
    case = checks.made_up()
    for layer in (2, 3, 4):
        keep = pruner.keep(case.hidden(layer), case.tokens, case.site(pruner, layer, L))
        for group in case.groups():
            rate = pruner.rate(layer, L, group.hop, Modality(group.modality))
            of = (case.tokens.modality == group.modality) & (case.tokens.hop == group.hop) & case.tokens.valid
            for b, n in enumerate((keep.mask & of).sum(1).tolist()):
                wanted = group.size[b] if rate is None else math.ceil(rate * group.size[b] - 1e-6)
                assert n == max(wanted, group.protected[b])


@pytest.mark.parametrize("options", [{}, {"rates": "penalty"}, {"relaxation": "paper_softmax"}], ids=str)
def test_gates_are_hard_in_value_and_teach_dropped_positions_too(options):
    pruner = made(**options)
    pruner.relax = Relaxation(temperature=1.0, gate_clip=1.0)
    keep, tokens = learn(pruner)
    assert set(keep.z.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(keep.z > 0.5, keep.mask)
    keep.logits.retain_grad()
    (keep.z * torch.randn(keep.z.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    dropped = tokens.valid & ~keep.mask
    # The only candidate of its group has nobody to compete with.
    assert (keep.logits.grad[dropped] != 0).float().mean() > 0.8
    if options.get("relaxation") is None:
        assert pruner.rates.theta.grad.any() and (
            pruner.rates.beta.grad is None or pruner.rates.beta.grad.isfinite().all()
        )


@pytest.mark.parametrize("rates", ["penalty", "bernoulli"])
def test_the_ratio_loss_moves_rates_that_are_free(rates):
    pruner = made(rates=rates)
    pruner.relax = Relaxation(temperature=1.0, gate_clip=1.0)
    keep, _ = learn(pruner)
    (keep.losses["ratio_text"] + keep.losses["ratio_vision"]).backward()
    moved = pruner.rates.theta if rates == "penalty" else pruner.router["2"].bias
    assert moved.grad.abs().sum() > 0


def test_the_hard_loss_lowers_deep_scores_above_the_threshold_only():
    pruner = made(hard_threshold=0.5)
    shallow, _ = learn(pruner, layer=2)
    assert "hard" not in shallow.losses
    keep, tokens = learn(pruner, layer=3)
    keep.logits.retain_grad()
    keep.losses["hard"].backward()
    vision = tokens.valid & ~tokens.protected & (tokens.modality == Modality.VISION)
    above = vision & (keep.logits > 0)
    assert above.any() and not above[vision].all()
    assert (keep.logits.grad[above] > 0).all()
    assert not keep.logits.grad[~above].any()


def test_a_summed_hard_loss_is_the_mean_one_times_what_it_is_the_mean_of():
    found = []
    for reduction in ("mean", "sum"):
        pruner = made(hard_threshold=0.5)
        pruner.relax = Relaxation(hard_reduction=reduction)
        keep, tokens = learn(pruner, layer=3)
        found.append(float(keep.losses["hard"].detach()))
    vision = tokens.valid & ~tokens.protected & ~tokens.generated & (tokens.modality == Modality.VISION)
    above = (torch.sigmoid(keep.logits.detach()) - 0.5).clamp(min=0)[vision]
    assert found[1] == pytest.approx(float(above.sum()), rel=1e-5)
    assert 0 < found[0] < found[1]


def test_a_rate_below_a_target_that_is_a_cap_is_not_pulled():
    for side, pulled in (("cap", False), ("both", True)):
        pruner = made(rates="penalty")
        pruner.relax = Relaxation(ratio_side=side)
        with torch.no_grad():
            pruner.rates.theta.fill_(-4.0)  # far below
            pruner.rates.beta.zero_()
        keep, _ = learn(pruner)
        assert keep.losses["share_vision"] < 0.4
        assert bool(keep.losses["ratio_vision"] > 0) == pulled


def test_scores_below_the_threshold_lower_deep_counts_and_then_the_rate():
    pruner = made(cutoff_layer=3, deep_vision_keep=0.5, vision_keep=0.6)
    keep, tokens = learn(pruner, layer=3)
    before = int(keep.mask.sum())
    with torch.no_grad():
        pruner.router["3"].bias[Modality.VISION] = -30.0
    keep, _ = learn(pruner, layer=3)
    vision = tokens.modality == Modality.VISION
    assert int(keep.mask.sum()) < before
    assert torch.equal(keep.mask & vision, tokens.protected & vision)
    counted = [[int((keep.mask[b] & (tokens.modality[b] == m)).sum()) for m in Modality] for b in range(len(keep.ran))]
    assert keep.ran == counted
    for _ in range(200):
        pruner.observe(tokens, {3: keep})
    pruner.eval()
    share = float((keep.mask & vision).sum() / (tokens.valid & vision).sum())
    assert abs(pruner.rate(3, L, 0, Modality.VISION) - share) < 0.01


def test_the_ramp_begins_with_everything():
    pruner = made()
    pruner.relax = Relaxation(vision_ramp=0.0, text_ramp=0.0, noise=1.0)
    for layer in (2, 5):
        keep, tokens = learn(pruner, layer)
        assert torch.equal(keep.mask, tokens.valid)


def test_noise_changes_the_set_and_equal_seeds_give_equal_sets():
    pruner = made()
    sets = []
    for noise, seed in ((0.0, 0), (5.0, 1), (5.0, 1)):
        pruner.relax = Relaxation(noise=noise, generator=torch.Generator().manual_seed(seed))
        sets.append(learn(pruner)[0].mask)
    assert not torch.equal(sets[0], sets[1])
    assert torch.equal(sets[1], sets[2])


def test_settled_routers_choose_in_training_what_they_choose_at_inference():
    pruner = made()
    pruner.relax = Relaxation(settled=True)
    keep, _ = learn(pruner)
    assert keep.z is None
    pruner.eval()
    case = checks.made_up()
    assert torch.equal(keep.mask, pruner.keep(case.hidden(2), case.tokens, case.site(pruner, 2, L)).mask)


def test_half_of_the_layers_is_said_to_be_a_guess_once(caplog):
    _tell_of_half.cache_clear()
    for cutoff in (4, None, None):
        Dare(cutoff_layer=cutoff).fit(checks.made_up_shape(L))
    assert [record.message.count("calibrate cliff") for record in caplog.records] == [1]


def test_untrained_routers_are_said_to_be_untrained(caplog):
    pruner = Dare()
    pruner.fit(checks.made_up_shape(L))
    pruner.eval()
    case = checks.made_up()
    with caplog.at_level(logging.WARNING):
        pruner.keep(case.hidden(2), case.tokens, case.site(pruner, 2, L))
    assert "dare-tf" in caplog.text


def test_the_oracle_recalls_what_fits_and_chance_recalls_its_share():
    case = checks.made_up([[(0, Modality.TEXT, 6), (0, Modality.VISION, 400), (0, Modality.TEXT, 6)]])
    vision = case.tokens.modality == Modality.VISION
    needed = vision & (torch.arange(vision.shape[1]) % 9 == 0)
    case.relevance = needed.float()
    shares = {}
    for scorer in ("oracle", "random"):
        pruner = made(rates="fixed", vision_schedule=[1, 1, 0.3, 0.3, 0.3, 0.3], scorer=scorer).eval()
        mask = pruner.keep(case.hidden(2), case.tokens, case.site(pruner, 2, L)).mask
        assert int((mask & vision).sum()) == 120
        shares[scorer] = float((mask & needed).sum() / needed.sum())
    assert shares["oracle"] == 1
    n = int(needed.sum())
    assert abs(shares["random"] - 0.3) < 3 * math.sqrt(0.3 * 0.7 / n)
