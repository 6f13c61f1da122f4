"""The learned controls rank as a loop does, keep their mean exactly, and learn; what they learn survives saving."""

import math

import pytest
import torch
from twins import CASES, LAYERS, TEXT, VISION, assert_same_sets, members, plain, twin

from mmroute import hub
from mmroute.checks import Case, D, made_up, made_up_shape, walk
from mmroute.errors import BudgetError, ConfigError
from mmroute.prune.base import Pruner, keep_count
from mmroute.tokens import Modality


def made(name: str, **options: float) -> Pruner:
    """With random routers."""
    pruner = hub.load("prune", name, **options)
    pruner.fit(made_up_shape(LAYERS))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in pruner.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return pruner.eval()


def logits(pruner: Pruner, case: Case, b: int, layer: int) -> list[float]:
    row = pruner.router[str(layer)]
    weight, bias, out = row.weight[0].detach().double(), float(row.bias.detach()), []
    for x in case.hidden(layer)[b].double():
        rms = math.sqrt(float(x.square().mean()) + 1e-6)
        out.append(float(x @ weight) / rms + bias)
    return out


def test_mod_keeps_the_largest_logits_of_vision_at_a_cosine_of_depth() -> None:
    pruner = made("mod", vision_keep=0.4)
    shares = [pruner.rate(i, LAYERS, 0, Modality.VISION) for i in range(LAYERS)]
    rates = [{VISION: 1.0 if s is None else s} for s in shares]
    for case in CASES:

        def score(b: int, layer: int, alive: list[int], case: Case = case) -> dict[int, float]:
            return (
                dict(enumerate(logits(pruner, case, b, layer)))
                if pruner.acts(layer, LAYERS)
                else dict.fromkeys(alive, 0.0)
            )

        with torch.no_grad():
            assert_same_sets(pruner, case, twin(case, score, rates, "skip"))


@pytest.mark.parametrize("mean", [0.1, 0.25, 0.4, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("num_layers", [1, 2, 8, 32])
def test_mod_meets_its_mean_after_clipping_and_falls(mean: float, num_layers: int) -> None:
    pruner = hub.load("prune", "mod", **hub.find("prune", "mod").plan(mean, num_layers))
    shares = [pruner.rate(i, num_layers, 0, Modality.VISION) for i in range(num_layers)]
    shares = [1.0 if s is None else s for s in shares]
    assert sum(shares) / num_layers == pytest.approx(mean, abs=1e-9)
    assert shares == sorted(shares, reverse=True)


def test_mod_scales_only_the_update_of_vision_that_may_be_left_out() -> None:
    pruner, case = made("mod", vision_keep=0.4), made_up()
    t = case.tokens
    for layer, keep in enumerate(walk(pruner, case, LAYERS)):
        if keep.gain is None:
            assert not pruner.acts(layer, LAYERS)
            continue
        free = (t.modality == VISION) & t.valid & ~t.protected
        assert (keep.gain[~free] == 1).all()
        want = 1 + 0.2 * torch.tanh(torch.tensor([logits(pruner, case, b, layer) for b in range(3)]))
        torch.testing.assert_close(keep.gain[free], want[free].float(), rtol=0, atol=1e-5)
    assert {p.grad is None for p in pruner.parameters()} == {True}


def test_an_untrained_mod_changes_no_update() -> None:
    pruner = hub.load("prune", "mod")
    pruner.fit(made_up_shape(LAYERS))
    assert all(k.gain is None or bool((k.gain == 1).all()) for k in walk(pruner, made_up(), LAYERS))


def test_symmetric_ranks_text_and_vision_of_a_hop_together() -> None:
    pruner = made("symmetric", keep=0.6, first_layer=1)
    for case in CASES:
        t = plain(case)
        with torch.no_grad():
            kept = walk(pruner, case, LAYERS)
        for layer in range(1, LAYERS):
            rate = pruner.rate(layer, LAYERS, 0, Modality.TEXT)
            for b in range(len(t.valid)):
                value, stay = logits(pruner, case, b, layer), set()
                for hop in (0, 1):
                    columns = [c for m in (TEXT, VISION) for c in members(case, b, hop, m)]
                    fixed = {c for c in columns if t.protected[b][c]}
                    room = 0
                    for modality in (TEXT, VISION):
                        mine = members(case, b, hop, modality)
                        held = len(fixed.intersection(mine))
                        room += keep_count(len(mine), rate, held) - held
                    free = sorted((c for c in columns if c not in fixed), key=lambda c, v=value: (-v[c], c))
                    stay |= fixed | set(free[:room])
                assert set(kept[layer].mask[b].nonzero().flatten().tolist()) == stay, f"layer {layer}, row {b}"


@pytest.mark.parametrize("keep", [0.3, 0.55, 0.9])
def test_symmetric_meets_its_mean_whatever_it_has_learned(keep: float) -> None:
    pruner = made("symmetric", keep=keep, first_layer=1)
    shares = [pruner.rate(i, LAYERS, 3, Modality.VISION) for i in range(LAYERS)]
    assert sum(1.0 if s is None else s for s in shares) / LAYERS == pytest.approx(keep, abs=1e-6)
    assert len({round(s, 3) for s in shares[1:]}) > 2
    assert shares == [pruner.rate(i, LAYERS, 0, Modality.TEXT) for i in range(LAYERS)]


def test_symmetric_gates_are_hard_and_reach_dropped_positions_and_rates() -> None:
    pruner, case = made("symmetric", keep=0.6, first_layer=1).train(), made_up()
    pruner.relax.gate_clip = 1.0  # so few gates stand here that a quantile would take all of them
    keep = min(walk(pruner, case, LAYERS)[1:], key=lambda k: int(k.mask.sum()))
    assert torch.equal(keep.z, keep.mask.float())
    dropped = case.tokens.valid & ~keep.mask
    (reached,) = torch.autograd.grad(keep.z[dropped].sum(), keep.logits, retain_graph=True)
    assert reached[dropped].abs().sum() > 0
    assert not reached[~case.tokens.valid].any()
    keep.z.sum().backward()
    assert pruner.theta.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["mod", "symmetric"])
def test_a_learned_control_is_made_for_one_model(name: str) -> None:
    pruner = made(name)
    shape = made_up_shape(LAYERS)
    pruner.fit(shape)
    assert {p.shape[-1] for n, p in pruner.named_parameters() if n.endswith("weight")} == {D}
    with pytest.raises(ConfigError, match="was made for"):
        pruner.fit(made_up_shape(LAYERS + 1))


def test_symmetric_refuses_a_mean_below_its_whole_layers() -> None:
    with pytest.raises(BudgetError, match="2 of 6 layers run whole"):
        hub.load("prune", "symmetric", keep=0.2).fit(made_up_shape(LAYERS))
