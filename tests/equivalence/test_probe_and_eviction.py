"""The attention row a pruner asks for is eager's, and what a layer forgets after running is what a mask would hide."""

import families
import pytest
import torch
from cases import LAYERS, Case, grid
from oracle import masked_forward
from routing import Constant, distance, play
from torch import Tensor

from mmroute import hub
from mmroute.prune.base import Keep, Site
from mmroute.tokens import Modality, Tokens


class Watch(Constant):
    """Keeps `keep` of everything from layer 1 on and notes the attention row it is given."""

    needs = frozenset({"row"})

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.share, self.rows = keep, []

    def acts(self, layer: int, num_layers: int) -> bool:
        return layer > 0

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        return self.share

    def scores(self, x: Tensor, tokens: Tokens, site: Site) -> Tensor:
        self.rows.append(site.row)
        return super().scores(x, tokens, site)


class WatchAll(Watch):
    """The same, but leaves nothing out: it chooses in its own way, and chooses all."""

    def counts(self, group: object, layer: int, num_layers: int) -> list[int]:
        return [-1]

    def keep(self, x: Tensor, tokens: Tokens, site: Site) -> Keep:
        self.rows.append(site.row)
        text, vision = (tokens.valid & (tokens.modality == m) for m in (0, 1))
        return Keep(tokens.valid, [[int(t), int(v), 0] for t, v in zip(text.sum(1), vision.sum(1), strict=True)])


@grid(attn=("sdpa", "eager"), rows=("one", "three", "padded"))
def test_row_is_the_last_row_of_eager_attention(case: Case) -> None:
    story = case.story(observations=1, tail=0)
    eager = Case(case.name, "eager", case.rows)
    out = eager.model(**story.whole, output_attentions=True)
    end = story.spans[0][1]
    prune = WatchAll(0.5)
    with case.attached(None, strip_padding=True) as routed:
        quiet = play(routed.model, story, routed.new_cache()).all
    with case.attached(prune) as routed:
        told = play(routed.model, story, routed.new_cache()).all
    assert torch.equal(told, quiet)  # looking changes nothing
    first, second = prune.rows[: LAYERS - 1], prune.rows[LAYERS - 1 :]
    for layer, (a, b) in enumerate(zip(first, second, strict=True)):
        want = out.attentions[layer].mean(1)
        assert distance(a, want[:, end - 1, :end], story.real[:, :end]) < 1e-6
        assert distance(b, want[:, -1, end:]) < 1e-6  # of the chunk's own columns


@grid(attn=("sdpa",), rows=("padded",))
def test_row_of_a_padded_batch_is_the_row_alone_and_pruned_columns_have_none(case: Case) -> None:
    batch, prune = case.prompt, Watch(0.5)
    with case.attached(prune) as routed:
        routed.full_trace = True
        routed.model(**batch)
        together, prune.rows = prune.rows, []
        kept = [layer.kept for layer in routed.trace.calls[0].layers]
        for row, pad in enumerate(case.pads):
            routed.model(**families.slice_batch(batch, row), use_cache=row == 0)  # with a cache and without
            alone, prune.rows = prune.rows, []
            for layer, (a, b) in enumerate(zip(together, alone, strict=True)):
                assert distance(a[row, pad:], b[0]) < 1e-6
                assert (a[row].nonzero().flatten()).tolist() == kept[layer][row]
                assert abs(float(a[row].sum()) - 1) < 1e-5


@grid(rows=("one", "padded"))
@pytest.mark.parametrize("share", [0.5])
def test_forgotten_keys_are_those_that_later_calls_do_not_see(case: Case, share: float) -> None:
    story = case.story(observations=1, tail=3)
    prune = hub.load("prune", "knorm", vision_keep=share, text_keep=0.8, start_layer=1)
    with case.attached(prune) as routed:
        told = play(routed.model, story, routed.new_cache())
    call = torch.cat([torch.full((e - s,), i) for i, (s, e) in enumerate(story.spans)])
    visible = []
    for layer in told.cache.layers:
        stays = torch.zeros_like(story.real)
        for row, n in enumerate(layer.n):
            stays[row, layer.pos[row, :n].long()] = True
        visible.append((call[:, None] == call) | stays[:, None, :])
    want = masked_forward(case.model, case.family, story.whole, [None] * LAYERS, visible)
    assert distance(told.all, want, story.real) < 1e-5
    first = told.cache.trace.calls[0].layers
    assert [sum(map(sum, layer.ran)) for layer in first] == [int(story.real[:, : story.spans[0][1]].sum())] * LAYERS
    assert all(a.stored < b.stored for a, b in zip(first[1:], first[:1] * 4, strict=True))
    assert first[1].extra_flops > first[0].extra_flops == 0
