"""The dense executor's gates: what they let through, and that their gradient is that of a gated softmax.

Legend: B batch, N positions, H query heads, K key-value heads, E head dim.
"""

import pytest
import torch
from gates import of_queries, softmax_times_gate
from torch.nn.functional import scaled_dot_product_attention

from mmroute.engine import gated
from mmroute.engine.attention import _attend, last_row
from mmroute.engine.gated import Gate
from mmroute.engine.train import key_gate, update_gate
from mmroute.errors import UnsupportedCall
from mmroute.prune.base import Keep
from mmroute.rows import Rows
from mmroute.tokens import Tokens

B, N, H, K, E = 2, 9, 4, 2, 8


@pytest.fixture
def tokens():
    hop = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 1, 1, 1, 2]])
    valid = torch.ones(B, N, dtype=torch.bool)
    valid[1, :2] = False
    nothing = torch.zeros_like(valid)
    return Tokens(torch.zeros_like(hop), hop, valid, nothing, nothing, torch.arange(N).expand(B, N))


@pytest.fixture
def soft():
    return torch.rand(B, N, generator=torch.Generator().manual_seed(0)).requires_grad_()


def _keep(soft, tokens, alive=None):
    hard = ((soft.detach() > 0.5) & tokens.valid).float()
    return Keep(hard.bool(), [[0, 0, 0]] * B, z=hard + soft - soft.detach(), alive=alive)


def _qkv():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, heads, N, E, generator=generator) for heads in (H, K, K)]


@pytest.mark.parametrize("spread", [1, 3, 100], ids=["even", "sinks", "leads of hundreds"])
def test_gated_attention_is_a_softmax_times_the_gate_and_so_is_its_gradient(tokens, soft, spread):
    keep = _keep(soft, tokens)
    inputs = [t.double().requires_grad_() for t in _qkv()]
    out = gated.attend(inputs[0] * spread, *inputs[1:], key_gate(keep, tokens), None).transpose(1, 2)
    rows = tokens.valid[:, None, :, None]
    (out * rows).square().sum().backward()
    found = [soft.grad, *(t.grad for t in inputs)]
    soft.grad = None

    again = [t.detach().clone().requires_grad_() for t in inputs]
    z = _keep(soft, tokens).z.double() * tokens.valid
    below = of_queries(Gate(z[:, None], tokens.valid))
    wanted = softmax_times_gate(again[0] * spread, *again[1:], below, E**-0.5)
    torch.testing.assert_close(out * rows, wanted * rows, atol=1e-12, rtol=0)
    (wanted * rows).square().sum().backward()
    assert (found[0][tokens.valid] != 0).sum() > N, "pruned keys must have a gradient too"
    torch.testing.assert_close(found[0], soft.grad, atol=1e-5, rtol=1e-5)  # the gates' gradient is float32
    for mine, theirs in zip(found[1:], again, strict=True):
        torch.testing.assert_close(mine, theirs.grad, atol=1e-9, rtol=1e-9)


def test_a_closed_key_that_leads_by_far_neither_leaks_nor_has_a_huge_gradient(tokens, soft):
    keep = _keep(soft, tokens)
    q, k, v = _qkv()
    q, k = q * 30, torch.where(keep.mask[:, None, :, None], k, k * 30)  # leads of up to hundreds
    out = gated.attend(q, k, v, key_gate(keep, tokens), None)
    alone = gated.attend(q, k, torch.where(keep.mask[:, None, :, None], v, v + 1e6), key_gate(keep, tokens), None)
    runs = keep.mask[:, :, None, None]
    torch.testing.assert_close(out * runs, alone * runs, atol=0, rtol=0)
    (out * runs).square().sum().backward()
    assert soft.grad.isfinite().all()
    assert soft.grad.abs().max() < 1e3


def test_every_group_of_queries_has_gates_of_its_own(tokens):
    generator = torch.Generator().manual_seed(2)
    soft = torch.rand(B, 3, N, generator=generator).requires_grad_()
    value = (soft.detach() > 0.4).float() + soft - soft.detach()
    q, k, v = _qkv()
    out = gated.attend(q, k, v, Gate(value, tokens.valid, tokens.hop), None).transpose(1, 2)
    weight = torch.randn(B, H, N, E, generator=generator) * tokens.valid[:, None, :, None]
    (out * weight).sum().backward()
    for g in range(3):
        other = soft.detach()[:, g].clone().requires_grad_()
        z = (other.detach() > 0.4).float() + other - other.detach()
        alone = gated.attend(q, k, v, Gate(z[:, None], tokens.valid), None).transpose(1, 2)
        mine = (tokens.hop == g)[:, None, :, None] * weight
        torch.testing.assert_close(out * mine, alone * mine, atol=1e-6, rtol=0)
        (alone * mine).sum().backward()
        torch.testing.assert_close(soft.grad[:, g], other.grad, atol=1e-5, rtol=1e-5)


def test_alive_gates_a_key_by_the_hop_of_the_query(tokens, soft):
    alive = torch.ones(B, 3, N)
    alive[0, 1:, 2] = 0  # column 2 leaves row 0's cache when hop 0 ends
    alive[1, 2, 6] = 0
    seen = key_gate(_keep(soft, tokens, alive), tokens).open()
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    wanted = causal & tokens.valid[:, None, :] | torch.eye(N, dtype=torch.bool)
    wanted[0, 4:, 2] = False
    wanted[1, 8:, 6] = False
    assert torch.equal(seen, wanted)


def test_hops_beyond_those_named_share_the_last_gate(tokens, soft):
    alive = torch.ones(B, 2, N)
    alive[:, 1, 3] = 0
    assert not key_gate(_keep(soft, tokens, alive), tokens).open()[0, 4:, 3].any()


def test_the_update_gate_is_the_product_of_what_is_given(soft, tokens):
    keep = _keep(soft, tokens)
    gain = torch.full((B, N), 0.5)
    assert update_gate(Keep(keep.mask, keep.ran)) is None
    assert update_gate(keep) is keep.z
    assert update_gate(Keep(keep.mask, keep.ran, gain=gain)) is gain
    assert torch.equal(update_gate(Keep(keep.mask, keep.ran, z=keep.z, gain=gain)), keep.z * 0.5)


@pytest.mark.parametrize("base", ["sdpa", "eager", "flash_attention_2", "flash_attention_3"])
def test_gates_are_the_same_whatever_the_backend(base, tokens, soft):
    class Attention(torch.nn.Module):
        num_key_value_groups, is_causal, training = H // K, True, False

    q, k, v = _qkv()
    rows = Rows([N] * B, [N] * B, False, gate=key_gate(_keep(soft, tokens), tokens))
    out, _ = _attend(base, Attention(), q, k, v, None, E**-0.5, rows)
    wanted = scaled_dot_product_attention(q, k, v, attn_mask=rows.gate.open()[:, None], enable_gqa=True)
    torch.testing.assert_close(out, wanted.transpose(1, 2))


def test_gates_refuse_dropout(tokens, soft):
    rows = Rows([N] * B, [N] * B, False, gate=key_gate(_keep(soft, tokens), tokens))
    with pytest.raises(UnsupportedCall, match="attention_dropout=0"):
        _attend("sdpa", torch.nn.Module(), *_qkv(), None, E**-0.5, rows, dropout=0.1)


def test_the_probed_row_under_the_mask_is_the_row_of_what_is_kept(tokens, soft):
    keep = _keep(soft, tokens)
    keep.mask[:, -1] = True
    keep.z = keep.mask.float()
    q, k, _ = _qkv()
    counts = keep.mask.sum(1).tolist()
    last = torch.full((B,), N - 1)
    rows = Rows([N] * B, [N] * B, False, gate=key_gate(keep, tokens), last=last, probe=True)
    found = last_row(q, k, rows, E**-0.5)
    packed = [t.transpose(1, 2)[keep.mask].transpose(0, 1)[None] for t in (q, k)]
    wanted = last_row(*packed, Rows(counts, counts, True), E**-0.5)
    for b, n in enumerate(counts):
        torch.testing.assert_close(found[b][keep.mask[b]], wanted[b, :n], atol=1e-6, rtol=0)
        assert found[b][~keep.mask[b]].max() < 1e-6
