"""Which image tokens are copied, how heavy, and where they stand."""

import pytest
import torch

from mmroute import hub
from mmroute.errors import ConfigError
from mmroute.think.base import Mind

V, D = 12, 4


def mind(axes=3, counts=(12, 12), seed=0, step=0):
    generator = torch.Generator().manual_seed(seed)
    row = torch.rand(2, V, generator=generator) * 0.01  # as small as attention is
    cells = torch.tensor([[0, i // 4, i % 4] for i in range(V)]).expand(2, -1, -1)
    places = torch.stack([torch.full((V,), 5), 5 + cells[0, :, 1], 5 + cells[0, :, 2]])[:, None].expand(-1, 2, -1)
    return Mind(
        hidden=torch.randn(2, D, generator=generator),
        next_position=torch.tensor([30, 40]),
        vision=torch.randn(2, V, D, generator=generator),
        places=places[:axes],
        cells=cells,
        counts=list(counts),
        columns=torch.arange(V).expand(2, -1),
        row=row,
        visited=torch.zeros(2, V, dtype=torch.bool),
        left=list(counts),
        seeds=torch.tensor([3, 4]),
        step=step,
    )


def think(name="vedas", **options):
    made = hub.load("think", name, **{"replay_tokens": 5, **options})
    made.fit(torch.randn(50, D, generator=torch.Generator().manual_seed(1)) * 0.3, torch.ones(D) * 2)
    return made


def test_the_state_is_scaled_to_the_size_of_words():
    made = hub.load("think", "coconut")
    words = torch.randn(50, D, generator=torch.Generator().manual_seed(1)) * 0.3
    made.fit(words, torch.ones(D) * 2)
    here = mind()
    want = here.hidden * float(words.square().mean().sqrt() / 2)
    torch.testing.assert_close(made.step(here).embeds[:, 0], want)
    raw = hub.load("think", "coconut", latent_scale="none")
    raw.fit(words, torch.ones(D))
    assert torch.equal(raw.step(here).embeds[:, 0], here.hidden)
    learned = hub.load("think", "coconut", latent_scale="learned")
    learned.fit(words, torch.ones(D) * 2)
    torch.testing.assert_close(learned.step(here).embeds[:, 0], want)
    assert [n for n, _ in learned.learned.named_parameters()] == ["scale"]


@pytest.mark.parametrize("kind", ["renorm", "softmax", "softmax_std", "none"])
@pytest.mark.parametrize("mean_one", [True, False])
def test_weights_average_to_one_or_sum_to_one(kind, mean_one):
    thought = think(replay_weighting=kind, rescale_mean_one=mean_one).step(mind(counts=(12, 3)))
    for b, n in enumerate((5, 3)):
        weight = thought.weight[b]
        torch.testing.assert_close(weight.sum(), torch.tensor(float(n) if mean_one else 1.0))
        assert (weight[: 5 - n] == 0).all()
        assert (weight[5 - n :] > 0).all()


def test_only_renormalised_weights_pass_a_gradient_worth_having():
    size = {}
    for kind in ("renorm", "softmax"):
        here = mind()
        here.row.requires_grad_()
        think(replay_weighting=kind).step(here).embeds.square().sum().backward()
        size[kind] = float(here.row.grad.abs().max())
    assert size["renorm"] > 30 * size["softmax"] > 0


def test_no_attention_at_all_weighs_all_alike():
    here = mind()
    here.row.zero_()
    thought = think().step(here)
    assert thought.source.tolist() == [[0, 1, 2, 3, 4]] * 2, "ties go to the lower index"
    assert (thought.weight == 1).all()


def test_order_and_choice():
    here = mind()
    best = here.row.argsort(dim=1, descending=True)[:, :5]
    assert torch.equal(think().step(mind()).source, best.sort(1).values)
    assert torch.equal(think(replay_order="rank").step(mind()).source, best)
    ranked = think(replay_order="rank").step(mind(counts=(12, 2)))
    assert ranked.source[1, :3].tolist() == [-1] * 3
    assert ranked.valid[1].tolist() == [False] * 3 + [True] * 3
    one, same, other = (think(replay_pick="random").step(m).source for m in (mind(), mind(seed=7), mind(step=1)))
    assert torch.equal(one, same), "it does not look"
    assert not torch.equal(one, other)
    assert not torch.equal(one[0], one[1]), "conversations differ"


def test_replay_at_the_first_latent_of_a_hop():
    made = think(latents_per_hop=2)
    assert [made.step(mind(step=t)).valid.shape[1] for t in range(4)] == [6, 1, 6, 1]
    every = think(latents_per_hop=2, replay_at="step")
    assert [every.step(mind(step=t)).valid.shape[1] for t in range(3)] == [6, 6, 6]
    twice = think(visited="allow")
    here = mind()
    assert torch.equal(twice.step(here).source, twice.step(here).source)


@pytest.mark.parametrize("counts", [(12, 12), (12, 2)])
def test_where_copies_stand(counts):
    here = mind(counts=counts)
    taken = [min(5, c) for c in counts]
    thought = think().step(here)
    for b, first in enumerate((30, 40)):
        real = thought.places[:, b, thought.valid[b]]
        assert (real == torch.arange(first, first + taken[b] + 1)).all()
        assert int(thought.next_position[b]) == first + taken[b] + 1
    source = think(replay_positions="source").step(mind(counts=counts))
    for b, first in enumerate((30, 40)):
        at = [i for i in source.source[b].tolist() if i >= 0]
        real = source.places[:, b, source.valid[b]]
        assert torch.equal(real[:, :-1], here.places[:, b, at])
        assert (real[:, -1] == first).all()
        assert int(source.next_position[b]) == first + 1
    small = think(replay_positions="mini_grid").step(mind(counts=counts))
    for b, first in enumerate((30, 40)):
        at = [i for i in small.source[b].tolist() if i >= 0]
        real = small.places[:, b, small.valid[b]]
        assert real[:, :-1].T.tolist() == [[first, first + i // 4, first + i % 4] for i in at]
        assert (real[:, -1] == first + 4).all(), "behind the longer side"
    with pytest.raises(ConfigError, match="mini_grid needs places with a row and a column"):
        think(replay_positions="mini_grid").step(mind(axes=1))


def test_a_soft_mix_is_one_token():
    thought, tokens = think(replay_form="soft_mix").step(mind()), think().step(mind())
    assert thought.valid.shape == (2, 2)
    torch.testing.assert_close(thought.embeds[:, 0], tokens.embeds[:, :5].mean(1))
    assert thought.next_position.tolist() == [32, 42]


def test_placeholders_do_not_hear_what_was_seen():
    made = hub.load("think", "pause", num_latents=3)
    made.fit(torch.randn(50, D) * 0.3, torch.ones(D))
    assert torch.equal(made.step(mind()).embeds, made.step(mind(seed=5)).embeds)
    assert not torch.equal(made.step(mind()).embeds, made.step(mind(step=1)).embeds)
    assert made.learned.placeholders.requires_grad
