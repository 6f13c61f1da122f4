"""The attention of the positions a pruner names is eager's, by head, at whatever layer and in whatever batch."""

import families
import pytest
import torch
from cases import LAYERS, Case, grid
from routing import Constant, distance, play
from torch import Tensor

from mmroute.prune import _rank
from mmroute.prune.base import Site
from mmroute.tokens import Modality, Tokens


class Ask(Constant):
    """Names the last three text positions, once each and as a mean, and notes what it is given."""

    needs = frozenset({"rows", "embeddings"})

    def __init__(self, share: float, forgets: bool = False) -> None:
        super().__init__()
        self.share, self.seen, self.entered, self.on = share, [], [], True
        if forgets:
            self.action = "kv_only"  # type: ignore[misc]

    def acts(self, layer: int, num_layers: int) -> bool:
        return layer > 0 and self.on

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        return self.share if modality is Modality.VISION else None

    def queries(self, tokens: Tokens, site: Site) -> tuple[Tensor, Tensor]:
        columns = _rank.last_valid(tokens.valid)[:, None] - torch.arange(3)
        return columns, torch.cat([torch.eye(3), torch.full((1, 3), 1 / 3)]).expand(tokens.shape[0], 4, 3)

    def scores(self, x: Tensor, tokens: Tokens, site: Site) -> Tensor:
        self.seen.append(site.rows)
        self.entered.append(site.embeddings)
        return super().scores(x, tokens, site)


@grid(rows=("one", "padded"))
@pytest.mark.parametrize("forgets", [False, True])
def test_named_rows_are_those_of_eager_attention(case: Case, forgets: bool) -> None:
    story = case.story(observations=1, tail=0)
    eager = Case(case.name, "eager", case.rows)
    out = eager.model(**story.whole, output_attentions=True, output_hidden_states=True)
    end, ask = story.spans[0][1], Ask(0.5, forgets)
    with case.attached(ask, strip_padding=True) as routed:
        play(routed.model, story, routed.new_cache(), chunks=range(1))
    layer = 1 if forgets else 0  # the first one asked about, before which nothing was left out
    want = out.attentions[layer]
    for row in range(want.shape[0]):
        for i in range(3):
            assert distance(ask.seen[0][row, :, i], want[row, :, end - 1 - i, :end]) < 1e-6
        assert distance(ask.seen[0][row, :, 3], want[row, :, end - 3 : end, :end].mean(1)) < 1e-6
    assert torch.equal(ask.entered[0], ask.entered[-1])
    assert distance(ask.entered[0], out.hidden_states[0][:, :end], story.real[:, :end]) < 1e-5


@grid(attn=("sdpa",), rows=("padded",))
@pytest.mark.parametrize("forgets", [False, True])
def test_named_rows_of_a_padded_batch_are_those_of_its_rows_alone(case: Case, forgets: bool) -> None:
    ask, batch = Ask(0.5, forgets), case.prompt
    with case.attached(ask) as routed:
        routed.model(**batch, use_cache=True)
        together, ask.seen = ask.seen, []
        assert len(together) == LAYERS - 1
        for row, pad in enumerate(case.pads):
            # With a cache and without; where nothing is cached nothing can be forgotten.
            routed.model(**families.slice_batch(batch, row), use_cache=forgets or row == 0)
            alone, ask.seen = ask.seen, []
            for a, b in zip(together, alone, strict=True):
                assert distance(a[row, :, :, pad:], b[0]) < 1e-6
                assert distance(b[0].sum(-1), torch.ones(b.shape[1:3])) < 1e-5


@grid(attn=("sdpa",), rows=("one", "padded"))
def test_named_rows_of_a_later_chunk_are_eagers_over_its_own_columns(case: Case) -> None:
    story = case.story(observations=1, tail=0)
    out = Case(case.name, "eager", case.rows).model(**story.whole, output_attentions=True)
    start, end = story.spans[1]
    ask = Ask(0.5)
    with case.attached(ask, strip_padding=True) as routed:
        cache = routed.new_cache()
        ask.on = False
        play(routed.model, story, cache, chunks=range(1))
        ask.on = True
        play(routed.model, story, cache, chunks=range(1, 2))
    want = out.attentions[0]
    got = ask.seen[0]
    for i in range(3):
        assert distance(got[:, :, i], want[:, :, end - 1 - i, start:end]) < 1e-6


@grid(names=("llava",), attn=("sdpa",), rows=("one",))
def test_named_rows_are_charged(case: Case) -> None:
    with case.attached(Ask(0.5)) as routed:
        routed.model(**case.prompt, use_cache=True)
        layers = routed.trace.calls[0].layers
    shape, N = routed.controller.shape, case.prompt["input_ids"].shape[1]
    assert layers[0].extra_flops == 2 * shape.heads * 3 * (shape.head_dim + 4) * N
    assert layers[-1].extra_flops == 0
