"""A bounded cache: what stays when a layer holds too much."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mmroute.prune._closing import capped


@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 40),
    room=st.integers(1, 40),
    weights=st.tuples(*[st.floats(0, 50)] * 3),
)
def test_a_trim_fills_its_room_with_the_best_and_never_more(seed, n, room, weights):
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(2, n, generator=generator)
    modality = torch.randint(0, 3, (2, n), generator=generator)
    valid = torch.rand(2, n, generator=generator) < 0.8
    protected = valid & (torch.rand(2, n, generator=generator) < 0.2)
    weight = {m: torch.full((2,), w) for m, w in enumerate(weights)}
    stays = capped(score, modality, valid, protected, room, weight)
    assert not (stays & ~valid).any()
    assert torch.equal(stays.sum(1), valid.sum(1).clamp(max=room))
    for b in range(2):
        if protected[b].sum() <= room:
            assert (stays[b] | ~protected[b]).all()
        for m in range(3):  # of one modality the better ones
            mine = valid[b] & ~protected[b] & (modality[b] == m)
            ins, outs = score[b][mine & stays[b]], score[b][mine & ~stays[b]]
            assert len(ins) == 0 or len(outs) == 0 or ins.min() >= outs.max()


def test_shares_of_the_room_go_by_weight():
    modality = torch.tensor([[0] * 20 + [1] * 20])
    valid, none = torch.ones(1, 40, dtype=torch.bool), torch.zeros(1, 40, dtype=torch.bool)
    weight = {0: torch.tensor([14.0]), 1: torch.tensor([8.0]), 2: torch.tensor([0.0])}
    stays = capped(torch.arange(40.0)[None], modality, valid, none, 11, weight)
    assert stays[0, :20].sum() == 7 and stays[0, 20:].sum() == 4
    assert stays[0, 13:20].all() and stays[0, 36:].all()
