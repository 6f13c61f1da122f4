"""One layer's cache against the plainest thing that could hold it: a list of (column, key, value, score) per row."""

from unittest.mock import patch

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mmroute import ragged
from mmroute.ragged import RaggedLayer

K, E = 2, 3


class LayerAgainstLists(RuleBasedStateMachine):
    """Random writes (rectangular, packed, single), compactions, crops and moved rows."""

    @initialize(rows=st.integers(1, 3), scored=st.booleans())
    def start(self, rows: int, scored: bool) -> None:
        self.layer, self.seen, self.stamp, self.scored = RaggedLayer(), 0, 0.0, scored
        self.rows: list[list[tuple[int, float, float]]] = [[] for _ in range(rows)]

    def _new(self, columns: list[int], scored: bool) -> list[tuple[int, float, float]]:
        out = []
        for column in columns:
            self.stamp += 1
            out.append((column, self.stamp, self.stamp % 64 if scored else float("inf")))
        return out

    @rule(width=st.integers(1, 70), data=st.data(), way=st.sampled_from(["rectangle", "packed"]), scores=st.booleans())
    def write(self, width: int, data: st.DataObject, way: str, scores: bool) -> None:
        B, scored = len(self.rows), self.scored and scores
        columns = range(self.seen, self.seen + width)
        if way == "rectangle":
            picked = [list(columns) for _ in range(B)]
        else:
            picked = [sorted(data.draw(st.sets(st.sampled_from(columns)))) for _ in range(B)]
            if not any(picked):
                return
        new = [self._new(row, scored) for row in picked]
        counts = [len(row) for row in new]
        flat = torch.tensor([entry for row in new for entry in row])
        position = flat[:, 0].long()
        keys = flat[:, 1][:, None, None].expand(-1, K, E)
        score = flat[:, 2] if scored else None
        if way == "rectangle":
            position, keys = position.view(B, -1), keys.reshape(B, -1, K, E).transpose(1, 2)
            score = None if score is None else score.view(B, -1)
        else:
            keys = keys.transpose(0, 1)[None]
        rows = self.layer.plan(B, counts, way == "packed", position, score, room=data.draw(st.integers(0, 9)))
        few = data.draw(st.sampled_from([0, ragged._FEW]))  # written a row at a time, or all by index
        with patch.object(ragged, "_FEW", few):
            k, v = self.layer.update(keys, -keys)
        for row, more in zip(self.rows, new, strict=True):
            row += more
        assert rows.q == counts
        assert rows.k == [len(row) for row in self.rows]
        assert k.shape == v.shape == (B, K, max(rows.k), E)
        self.seen += width

    @precondition(lambda self: self.layer.pos is not None)
    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        most = max(len(row) for row in self.rows)
        stays = [[data.draw(st.booleans()) for _ in row] for row in self.rows]
        mask = torch.zeros(len(self.rows), most, dtype=torch.bool)
        for b, row in enumerate(stays):
            mask[b, : len(row)] = torch.tensor(row, dtype=torch.bool)
        self.rows = [
            [e for e, s in zip(row, keep, strict=True) if s] for row, keep in zip(self.rows, stays, strict=True)
        ]
        self.layer.keep(mask, [len(row) for row in self.rows])

    @precondition(lambda self: self.layer.pos is not None)
    @rule(back=st.integers(0, 80))
    def crop(self, back: int) -> None:
        self.seen = max(self.seen - back, 0)
        self.rows = [[e for e in row if e[0] < self.seen] for row in self.rows]
        assert self.layer.before(self.seen).tolist() == [len(row) for row in self.rows]
        self.layer.shorten([len(row) for row in self.rows])

    @precondition(lambda self: self.layer.n is not None)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        index = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=4))
        self.rows = [list(self.rows[i]) for i in index]
        self.layer._rows(torch.tensor(index), [self.layer.n[i] for i in index])

    @invariant()
    def holds_what_the_lists_hold(self) -> None:
        layer = getattr(self, "layer", None)
        if layer is None or layer.pos is None:
            return
        assert layer.lengths == [len(row) for row in self.rows]
        for b, row in enumerate(self.rows):
            n = len(row)
            assert layer.pos[b, :n].tolist() == [column for column, _, _ in row]
            assert (layer.pos[b, n:] == -1).all()
            want = torch.tensor([value for _, value, _ in row])[:, None].expand(-1, E)
            assert torch.equal(layer.keys[b, 0, :n], want)
            assert torch.equal(layer.values[b, -1, :n], -want)
            assert not layer.keys[b, :, n:].any()
            assert not layer.values[b, :, n:].any()
            if layer.score is not None:
                assert layer.score[b, :n].tolist() == [score for _, _, score in row]


TestLayerAgainstLists = LayerAgainstLists.TestCase
TestLayerAgainstLists.settings = settings(max_examples=40, stateful_step_count=12, deadline=None, derandomize=True)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 5), min_size=2, max_size=4).filter(any))
def test_a_decode_step_writes_behind_each_row(lengths: list[int]) -> None:
    layer, B = RaggedLayer(), len(lengths)
    total = sum(lengths)
    layer.plan(B, lengths, True, torch.arange(total), None, 0)
    layer.update(torch.ones(1, K, total, E), torch.ones(1, K, total, E))
    layer.plan(B, [1] * B, False, torch.full((B, 1), 99), None, 0)
    keys, _ = layer.update(torch.full((B, K, 1, E), 7.0), torch.full((B, K, 1, E), 7.0))
    for b, n in enumerate(lengths):
        assert keys[b, 0, : n + 1, 0].tolist() == [1.0] * n + [7.0]
        assert layer.pos[b, n] == 99
