"""VisionZip keeps and merges what a slow loop written from the paper does, by what the stock tower attends to."""

import families
import pytest
import torch
from twins import CASES, LAYERS, VISION, members, plain

import mmroute
from mmroute import hub
from mmroute.backbones import tower
from mmroute.checks import Case, walk
from mmroute.errors import UnsupportedBackbone, UnsupportedCall
from mmroute.tokens import Modality


def loop(case: Case, b: int, share: float, contextual: float) -> tuple[set[int], dict[int, torch.Tensor]]:
    """Columns that stay in a row, and the new states of targets."""
    look, x = case.sources(0)["tower"](), case.x[b]
    stay, states = {c for c, real in enumerate(plain(case).valid[b]) if real}, {}
    for hop in range(3):
        image, free = members(case, b, hop, VISION), members(case, b, hop, VISION, free=True)
        room = max(-(-round(share * len(image) * 1e6) // 10**6) - (len(image) - len(free)), 0)
        if not 0 < room < len(free):
            stay -= set(free) if room <= 0 else set()
            continue
        few = round(contextual * room)
        ranked = sorted(free, key=lambda c: (-float(look.score[b, c]), c))
        rest = sorted(ranked[room - few :])
        stay -= set(rest)
        if not few:
            continue
        targets = [rest[i * (len(rest) // few)] for i in range(few)]
        joined: dict[int, list[int]] = {c: [] for c in targets}
        for c in (c for c in rest if c not in targets):
            key = look.keys[b, c].double()
            like = {d: float(torch.cosine_similarity(key, look.keys[b, d].double(), dim=0)) for d in targets}
            joined[max(targets, key=lambda d: like[d])].append(c)
        for target, others in joined.items():
            stay.add(target)
            states[target] = x[target] + (torch.stack([x[c] for c in others]).mean(0) if others else 0)
    return stay, states


def test_visionzip_keeps_what_the_tower_looks_at_and_merges_the_rest_into_a_few() -> None:
    pruner, merged = hub.load("prune", "visionzip", vision_keep=0.6, contextual=0.4), 0
    for case in CASES:
        kept = walk(pruner, case, LAYERS)
        for b in range(case.tokens.shape[0]):
            stay, states = loop(case, b, 0.6, 0.4)
            for keep in kept:
                assert set(keep.mask[b].nonzero().flatten().tolist()) == stay
            for target, state in states.items():
                torch.testing.assert_close(kept[0].write[1][b, target], state)
            if kept[0].write is not None:
                changed = (kept[0].write[1][b] != case.x[b]).any(-1).nonzero().flatten().tolist()
                assert set(changed) <= set(states)
                merged += len(changed)
        assert all(keep.write is None for keep in kept[1:])
    assert merged > 50


def test_the_paper_s_54_and_10_of_576() -> None:
    pruner = hub.load("prune", "visionzip", vision_keep=64 / 576)
    assert round(pruner.config.contextual * 64) == 10
    assert pruner.rate(0, 32, 0, Modality.VISION) == pytest.approx(64 / 576)


def attached(name: str, **options: object) -> tuple[object, dict[str, torch.Tensor], object]:
    model = families.make(name, "eager", layers=3)
    batch = families.make_inputs(name, model, batch=2, pads=[0, 3], images=2, before=4, after=6)
    return model, batch, hub.load("prune", "visionzip", **options)


@pytest.mark.parametrize("name", [name for name in families.NAMES if name not in ("chameleon", "llava_next")])
@torch.no_grad()
def test_what_the_tower_costs_is_charged_and_what_runs_is_what_was_asked(name: str) -> None:
    model, batch, pruner = attached(name, vision_keep=0.4)
    with mmroute.attach(model, prune=pruner) as routed:
        routed.model(**batch, use_cache=True)
        call = routed.trace.calls[0]
        # A second call without pictures ranks nothing and needs no tower.
        routed.model(input_ids=torch.tensor([[5, 6, 7]]))
    assert not any(handle.id in model.get_encoder("image")._forward_pre_hooks for handle in routed._handles)
    patches, width = batch["pixel_values"].shape[0], 32
    if name == "llava":
        least = 2 * patches * (16 + 1) * width
    else:
        least = 6 * patches * width * width
    assert call.layers[0].extra_flops > least
    assert [layer.extra_flops for layer in call.layers[1:]] == [0, 0]


@torch.no_grad()
def test_on_llava_scores_are_the_stock_tower_s_attention_of_its_class_position() -> None:
    model, batch, _ = attached("llava")
    seen = tower.tower_of("llava", model)
    handles = seen.watch()
    maps = model.model.vision_tower(batch["pixel_values"], output_attentions=True, return_dict=True).attentions
    look = seen.take()
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(look.score, maps[-2][:, :, 0, 1:].sum(1).flatten(), rtol=0, atol=1e-6)
    assert seen.take() is None


@pytest.mark.parametrize("name", [name for name in families.NAMES if name.startswith("qwen")])
@torch.no_grad()
def test_a_token_s_key_is_that_of_its_own_patches(name: str) -> None:
    """Another patch changes one token's key in the first block, and it is the token that stands for this patch."""
    model = families.make(name, "eager", layers=2)
    visual = model.model.visual
    seen = tower.QwenTower(visual, [visual.blocks[0]])
    handles = seen.watch()
    grid = torch.tensor([[1, 8, 12]])
    pixels = torch.randn(96, 3 * 2 * 4**2, generator=torch.Generator().manual_seed(0))
    visual(pixels, grid_thw=grid)
    before = seen.take().keys
    for token in (0, 5, 17, 23):
        other = pixels.clone()
        other[4 * token + 2] += 1
        visual(other, grid_thw=grid)
        changed = (seen.take().keys - before).abs().amax(1) > 1e-6
        assert changed.nonzero().flatten().tolist() == [token]
    for handle in handles:
        handle.remove()


def test_a_family_without_a_tower_is_refused_and_so_are_embeddings() -> None:
    model, batch, pruner = attached("chameleon")
    with pytest.raises(UnsupportedBackbone, match="no vision tower whose attention can be read"):
        mmroute.attach(model, prune=pruner)
    model, batch, pruner = attached("llava")
    embeds = model.get_input_embeddings()(batch["input_ids"].clamp(max=400))
    given = {"modality": (batch["input_ids"] == model.config.image_token_id).long(), "inputs_embeds": embeds}
    with mmroute.attach(model, prune=pruner) as routed, pytest.raises(UnsupportedCall, match="pass pixel_values"):
        routed.model(attention_mask=batch["attention_mask"], **given)
