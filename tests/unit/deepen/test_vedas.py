"""Depth routing against a slow reference: whom a segment chooses, by how much they change, what never goes again."""

import pytest
import torch

from mmroute.deepen.random import Random
from mmroute.deepen.uniform import Uniform
from mmroute.deepen.vedas import Vedas
from mmroute.errors import ConfigError
from mmroute.tokens import Modality, Tokens
from mmroute.trace import Shape

SHAPE = Shape(hidden=8, layers=4, heads=2, kv_heads=1, head_dim=4, mlp=16, vocab=10, itemsize=4)
HOP = torch.tensor([[0] * 6 + [1] * 3, [0] * 6 + [1] * 3])
VALID = torch.tensor([[1] * 9, [0, 0, 1, 1, 1, 1, 1, 1, 1]]).bool()
LATENT = 8


def drawn(cls=Vedas, **options):
    deepener = cls(**{"deepen_tokens": 3, "chunk_tokens": 2, **options})
    deepener.fit(SHAPE)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in deepener.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return deepener


def call(deepener, x, valid=VALID, layer=1, depth=1, ran=None):
    """Six given positions, then two replayed ones and a latent."""
    modality = torch.zeros_like(HOP)
    modality[:, LATENT] = int(Modality.LATENT)
    nothing = torch.zeros_like(valid)
    tokens = Tokens(modality, HOP, valid, nothing, nothing, torch.arange(9).expand(2, -1))
    sizes = [[int(valid[b, HOP[b] == h].sum()) for h in (0, 1)] for b in range(2)]
    latents = [[0, 1] for _ in range(2)]
    return deepener.again(x, tokens, valid if ran is None else ran, sizes, latents, layer, depth)


def states(seed=0):
    return torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("score_input", ["rms", "raw"])
@pytest.mark.parametrize("gate", ["sigmoid", "identity"])
def test_it_chooses_and_weighs_as_a_loop_over_positions_does(score_input, gate):
    deepener, x = drawn(score_input=score_input, gate=gate), states()
    again = call(deepener, x)
    router, scale = deepener.router["1"].requires_grad_(False), deepener.scale["1"][0]
    for b in range(2):
        score = {}
        for i in range(9):
            v = x[b, i] / (x[b, i].pow(2).mean() + 1e-6).sqrt() if score_input == "rms" else x[b, i]
            score[i] = float(v @ router.weight[0] + router.bias)
        given = [i for i in range(6) if VALID[b, i]]
        chosen = sorted(given, key=lambda i, s=score: -s[i])[:3]
        chosen += [LATENT, max((6, 7), key=lambda i, s=score: s[i])]  # the latent always, and one beside it
        assert again.mask[b].nonzero().flatten().tolist() == sorted(chosen)
        for i in chosen:
            weight = torch.sigmoid(torch.tensor(score[i])) if gate == "sigmoid" else score[i]
            torch.testing.assert_close(again.gain[b, i], scale * weight, rtol=0, atol=1e-5)  # order of the sum
    assert again.counts == [5, 5]


def test_short_segments_and_single_positions():
    alone = call(drawn(deepen_tokens=30), states())
    assert alone.counts == [6 + 2, 4 + 2], "never more than are there, and no padding"
    assert call(drawn(deepen_tokens=0, chunk_tokens=0), states()) is None
    lonely = VALID.clone()
    lonely[:, 1:6] = False
    lonely[0, 0], lonely[1, 5] = True, True
    again = call(drawn(), states(), valid=lonely)
    assert again.counts == [2, 2]
    assert not again.mask[:, :6].any(), "a segment of one given position would always choose itself"


def test_later_passes_are_for_whom_the_first_one_chose_with_a_vector_of_their_own():
    deepener = drawn(max_depth=2)
    first = call(deepener, states())
    second = call(deepener, states(1), depth=2, ran=first.mask)
    assert torch.equal(first.mask, second.mask)
    assert first.counts == second.counts
    torch.testing.assert_close(second.gain, call(deepener, states(1), depth=2).gain, rtol=0, atol=0)
    assert not torch.equal(call(deepener, states(1)).gain, second.gain)


def test_budgets_by_layer_and_by_share():
    assert [drawn(deepen_tokens=64, schedule="cosine").tokens_at(i, 5) for i in range(5)] == [64, 57, 40, 23, 16]
    linear = drawn(deepen_tokens=10, deepen_tokens_last=2, schedule="linear")
    assert [linear.tokens_at(i, 5) for i in range(5)] == [10, 8, 6, 4, 2]
    assert call(drawn(deepen_share=0.5), states()).counts == [3 + 2, 2 + 2]


def test_parts_exist_for_routed_layers_only_and_start_at_nothing():
    deepener = Vedas(layers=[0, 3], max_depth=2)
    deepener.fit(SHAPE)
    names = {n: tuple(p.shape) for n, p in deepener.named_parameters()}
    assert names == {
        **{f"router.{i}.{leaf}": shape for i in (0, 3) for leaf, shape in (("weight", (1, 8)), ("bias", (1,)))},
        **{f"scale.{i}": (2, 8) for i in (0, 3)},
    }
    assert not any(p.any() for n, p in deepener.named_parameters() if n.startswith("scale"))
    before = deepener.router["0"].weight
    deepener.fit(SHAPE)
    assert deepener.router["0"].weight is before, "attaching again keeps what was learned"
    with pytest.raises(ConfigError, match=r"layers: \[4\] given, the model has layers 0 to 3"):
        Vedas(layers=[1, 4]).fit(SHAPE)


def test_the_random_control_has_the_budgets_and_the_vectors_but_no_router():
    control = drawn(Random)
    assert {n for n, _ in control.named_parameters()} == {"scale.1", "scale.3"}
    again = call(control, states())
    assert again.counts == call(drawn(), states()).counts
    assert torch.equal(again.mask, call(control, states(1)).mask), "it does not look"
    assert not torch.equal(again.mask, call(drawn(Random, seed=1), states()).mask)
    torch.testing.assert_close(again.gain, control.scale["1"][0].expand(2, 9, 8), rtol=0, atol=0)


def test_routers_learn_only_once_the_vectors_have_left_zero():
    deepener = Vedas(deepen_tokens=3)
    deepener.fit(SHAPE)
    call(deepener, states()).gain.sum().backward()
    assert deepener.scale["1"].grad.abs().min() > 0
    assert not deepener.router["1"].weight.grad.any()
    with torch.no_grad():
        deepener.scale["1"] += 0.1
    call(deepener, states()).gain.sum().backward()
    assert deepener.router["1"].weight.grad.abs().max() > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cls", [Random, Uniform])
def test_a_row_chooses_at_random_alone_what_it_chooses_behind_padding(cls, seed):
    options = {"deepen_tokens": 3, "seed": seed}
    deepener = drawn(Random, **options) if cls is Random else Uniform(**options)
    x = states()
    padded = call(deepener, x)
    nothing = torch.zeros(1, 7, dtype=torch.bool)
    modality = torch.zeros(1, 7, dtype=torch.long)
    modality[:, LATENT - 2] = int(Modality.LATENT)
    alone = Tokens(modality, HOP[1:, 2:], VALID[1:, 2:], nothing, nothing, torch.arange(7)[None])
    again = deepener.again(x[1:, 2:], alone, VALID[1:, 2:], [[4, 3]], [[0, 1]], 1, 1)
    assert torch.equal(again.mask[0], padded.mask[1, 2:])
