"""Moving kept positions in and out of the stream, and choosing them, against loops."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from mmroute.rows import pick
from mmroute.select import first_true, group_positions, narrow, top
from mmroute.tokens import Tokens

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
D = 2


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    B, N = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    bits = draw(st.lists(st.booleans(), min_size=B * N, max_size=B * N))
    return torch.tensor(bits).view(B, N)


@SETTINGS
@given(mask=masks(), rectangle=st.booleans())
def test_what_is_taken_and_put_back_is_the_masked_stream(mask: torch.Tensor, rectangle: bool) -> None:
    B, N = mask.shape
    counts = mask.sum(1).tolist()
    if not any(counts):
        return
    rectangle = rectangle and len(set(counts)) == 1
    chosen = pick(mask, counts, rectangle)
    x = torch.arange(B * N * D, dtype=torch.float32).view(B, N, D)
    taken = chosen.take(x)
    assert taken.shape == ((B, counts[0], D) if rectangle else (1, sum(counts), D))
    assert torch.equal(taken.reshape(-1, D), x[mask])  # row by row, ascending
    assert torch.equal(chosen.put(x, taken + 0.5), x + 0.5 * mask[..., None])
    assert torch.equal(chosen.mask(x.device), mask)
    column = torch.arange(N).expand(B, N)
    assert torch.equal(chosen.columns(column).reshape(-1), column[mask])
    shared = x[:1]
    assert torch.equal(chosen.take(shared).reshape(-1, D), shared.expand(B, -1, -1)[mask])


@SETTINGS
@given(mask=masks(), extra=st.integers(0, 2))
def test_first_true_lists_columns_in_order(mask: torch.Tensor, extra: int) -> None:
    counts = mask.sum(1).tolist()
    columns = first_true(mask, min(max(counts) + extra, mask.shape[1]))
    for row, n, got in zip(mask, counts, columns, strict=True):
        assert got[:n].tolist() == row.nonzero().flatten().tolist()


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tokens, torch.Tensor, int]:
    B, N, hops = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 2))

    def ints(most: int) -> torch.Tensor:
        return torch.tensor(draw(st.lists(st.integers(0, most), min_size=B * N, max_size=B * N))).view(B, N)

    valid, generated = ints(3) > 0, ints(5) == 0
    position = torch.arange(N).expand(B, N)
    tokens = Tokens(ints(2), ints(hops - 1), valid, (ints(4) == 0) & valid, generated & valid, position)
    return tokens, ints(3).float(), hops  # few values: many ties


@SETTINGS
@given(call=calls(), data=st.data())
def test_best_of_each_group_are_those_a_loop_finds(call: tuple[Tokens, torch.Tensor, int], data: st.DataObject) -> None:
    tokens, scores, hops = call
    groups, valid = group_positions(tokens, hops)
    assert valid == tokens.valid.sum(1).tolist()
    B, N = tokens.shape
    want = (tokens.protected | tokens.generated) & tokens.valid
    ran = [[0, 0, 0] for _ in range(B)]
    take = {}
    for i, group in enumerate(groups):
        take[i] = []
        for b in range(B):
            here = [
                n
                for n in range(N)
                if tokens.valid[b, n]
                and bool(tokens.generated[b, n]) == group.generated
                and tokens.hop[b, n] == group.hop
                and tokens.modality[b, n] == group.modality
            ]
            free = [n for n in here if not tokens.protected[b, n] and not group.generated]
            assert (group.size[b], group.width[b]) == (len(here), len(free))
            assert group.free[b, : len(free)].tolist() == free
            k = data.draw(st.integers(0, len(free)))
            best = sorted(free, key=lambda n, b=b: (-float(scores[b, n]), n))[:k]
            want[b, best] = True
            take[i].append(group.protected[b] + k)
            ran[b][group.modality] += group.protected[b] + k
    mask, counted = top(scores, tokens, groups, take)
    assert torch.equal(mask, want)
    assert counted == ran
    for i, group in enumerate(groups):  # and what is narrowed by the mask is what the mask left
        free = [k - p for k, p in zip(take[i], group.protected, strict=True)]
        left = narrow(group, mask.float(), free)
        for b in range(B):
            stays = [n for n in group.free[b, : group.width[b]].tolist() if mask[b, n]]
            assert left.free[b, : left.width[b]].tolist() == stays
