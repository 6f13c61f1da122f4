"""The dense executor's gates: what they let through, and that their gradient is that of a gated softmax.

Legend: B batch, N positions, H query heads, K key-value heads, E head dim.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mmroute.engine import gated
from mmroute.engine.attention import _attend, last_row
from mmroute.engine.gated import Gate
from mmroute.engine.rows import Rows
from mmroute.engine.train import key_gate, update_gate
from mmroute.prune.base import Keep
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


def _gated_softmax(q, k, v, gate):
    """Attention whose weights are multiplied by `gate` (B, N, N) before they are normalised; float64."""
    k, v = (t.repeat_interleave(H // K, 1) for t in (k, v))
    weight = (q @ k.transpose(-1, -2) * E**-0.5).exp() * gate[:, None]
    return weight / weight.sum(-1, keepdim=True) @ v


def _masked(q, k, v, gate):
    return scaled_dot_product_attention(q, k, v, attn_mask=gate.mask(q.dtype), enable_gqa=True)


def _fused(q, k, v, gate):
    assert gated.serves(q, gate)
    return gated.attend(q, k, v, gate, None).transpose(1, 2)


@pytest.mark.parametrize("attend", [_masked, _fused])
@pytest.mark.parametrize("spread", [1, 3], ids=["even", "sinks"])
def test_gated_attention_is_a_softmax_times_the_gate_and_so_is_its_gradient(tokens, soft, spread, attend):
    keep = _keep(soft, tokens)
    q, k, v = _qkv()
    q = q * spread  # 3: scores of one query differ by up to 19
    out = attend(q, k, v, key_gate(keep, tokens))
    rows = tokens.valid[:, None, :, None]
    (out * rows).square().sum().backward()
    found, soft.grad = soft.grad, None

    z = _keep(soft, tokens).z.double() * tokens.valid
    gate = torch.ones(N, N).tril() * z[:, None, :]
    gate = torch.where(torch.eye(N, dtype=torch.bool), 1.0, gate)
    q, k, v = (t.double() for t in (q, k, v))
    wanted = _gated_softmax(q, k, v, gate)
    torch.testing.assert_close(out.double()[rows.expand_as(out)], wanted[rows.expand_as(out)], atol=1e-5, rtol=0)
    (wanted * rows).square().sum().backward()
    assert (found[tokens.valid] != 0).sum() > N, "pruned keys must have a gradient too"
    torch.testing.assert_close(found, soft.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("hops", [1, 3])
def test_the_fused_way_has_the_mask_s_gradients_for_everything(tokens, soft, hops):
    """In float64, where nothing but a mistake tells them apart; queries that are gated off get gradients here too."""
    generator = torch.Generator().manual_seed(2)
    log = torch.rand(B, hops, N, generator=generator).double().log()
    log[:, :, 2::3] = 0  # fully open
    log[:, :, 3] = 0.3  # and further, as a gain could have it
    log[:, :, 4] = -36.8  # as good as shut
    log = log.masked_fill(~tokens.valid[:, None], -1e4)
    group = None if hops == 1 else tokens.hop
    weight = torch.randn(B, H, N, E, generator=generator).double() * tokens.valid[:, None, :, None]
    found = []
    for attend in (_masked, _fused):
        inputs = [t.double().requires_grad_() for t in (*_qkv(), log)]
        out = attend(*inputs[:3], Gate(inputs[3], group))
        assert out.isfinite().all()
        (out * weight).sum().backward()
        found.append([(out * weight).detach(), *(t.grad for t in inputs)])
    for masked, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, masked, atol=1e-9, rtol=1e-6)


def test_what_the_fused_way_does_not_serve_takes_the_mask(tokens, soft):
    gate = key_gate(_keep(soft, tokens), tokens)
    query = torch.zeros(B, H, N, E)
    assert gated.serves(query, gate)
    assert not gated.serves(query.bfloat16(), gate)  # the gradient of a gate would be rounded away
    assert not gated.serves(SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32), gate)
    assert not gated.serves(query, Gate(torch.zeros(B, 17, N), tokens.hop))
    with torch.autocast("cpu"):
        assert not gated.serves(query, gate)


def test_a_row_of_the_gates_is_a_row_of_their_mask(tokens, soft):
    at = torch.tensor([5, 8])
    for alive in (None, torch.rand(B, 3, N, generator=torch.Generator().manual_seed(0))):
        gate = key_gate(_keep(soft, tokens, alive), tokens)
        assert torch.equal(gate.row(at), gate.mask(torch.float32)[torch.arange(B), 0, at])


def test_alive_gates_a_key_by_the_hop_of_the_query(tokens, soft):
    alive = torch.ones(B, 3, N)
    alive[0, 1:, 2] = 0  # column 2 leaves row 0's cache when hop 0 ends
    alive[1, 2, 6] = 0
    bias = key_gate(_keep(soft, tokens, alive), tokens).mask(torch.float32)[:, 0]
    seen = bias > -10
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    wanted = causal & tokens.valid[:, None, :] | torch.eye(N, dtype=torch.bool)
    wanted[0, 4:, 2] = False
    wanted[1, 8:, 6] = False
    assert torch.equal(seen, wanted)


def test_hops_beyond_those_named_share_the_last_gate(tokens, soft):
    alive = torch.ones(B, 2, N)
    alive[:, 1, 3] = 0
    bias = key_gate(_keep(soft, tokens, alive), tokens).mask(torch.float32)[:, 0]
    assert (bias[0, 4:, 3] < -10).all()


def test_the_update_gate_is_the_product_of_what_is_given(soft, tokens):
    keep = _keep(soft, tokens)
    gain = torch.full((B, N), 0.5)
    assert update_gate(Keep(keep.mask, keep.ran)) is None
    assert update_gate(keep) is keep.z
    assert update_gate(Keep(keep.mask, keep.ran, gain=gain)) is gain
    assert torch.equal(update_gate(Keep(keep.mask, keep.ran, z=keep.z, gain=gain)), keep.z * 0.5)


@pytest.mark.parametrize("base", ["flash_attention_2", "flash_attention_3"])
def test_flash_kernels_take_no_float_mask_so_the_dense_executor_runs_sdpa(base, tokens, soft):
    class Attention(torch.nn.Module):
        num_key_value_groups, is_causal, training = H // K, True, False

    q, k, v = _qkv()
    rows = Rows([N] * B, [N] * B, False, gate=key_gate(_keep(soft, tokens), tokens))
    out, _ = _attend(base, Attention(), q, k, v, None, E**-0.5, rows)
    wanted = scaled_dot_product_attention(q, k, v, attn_mask=rows.gate.mask(torch.float32), enable_gqa=True)
    torch.testing.assert_close(out, wanted.transpose(1, 2))


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
