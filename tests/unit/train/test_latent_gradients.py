"""Gradients of a latent run: each mode against the longest way, and what the closer look teaches."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from latent_runs import DEPTH, VEDAS, lesson, recipe

from mmroute.train.vedas import VedasRun


def gradients(run, worked):
    (worked.answer + worked.supervised + worked.coherence).backward()
    found = {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}
    run.model.zero_grad(set_to_none=True)
    return found


def relative(got, want):
    assert got.keys() == want.keys()
    scale = max(float(g.norm()) for g in want.values())
    return max(float((got[n] - want[n]).norm()) for n in want) / scale


def worked(model, tmp_path, mode, think=None, deepen=None, latents="all", **train):
    given = recipe(think, deepen, latent_grad=mode, **train)
    with VedasRun(given, model, tmp_path / f"{mode}{train}".replace(":", ""), False) as run:
        run.model.train()
        out = run.passes.work(lesson(run), latents)
        return out, gradients(run, out)


@pytest.mark.parametrize("deepen", [None, DEPTH])
@pytest.mark.parametrize("stop", ["head", "fixed"])
def test_no_gradient_through_latents_is_one_pass_over_what_they_were(model, tmp_path, deepen, stop):
    think = {**VEDAS, "stop": stop}
    once, got = worked(model, tmp_path, "none", think, deepen)
    chunks, want = worked(model, tmp_path, "truncated:0", think, deepen)
    assert abs((once.answer - chunks.answer).item()) < 1e-5
    assert abs((once.supervised - chunks.supervised).item()) < 1e-5
    assert relative(got, want) < 1e-4  # float32 sums in another order


def test_cutting_off_nothing_is_the_full_gradient(model, tmp_path):
    _, want = worked(model, tmp_path, "full", deepen=DEPTH)
    _, got = worked(model, tmp_path, "truncated:9", deepen=DEPTH)
    _, less = worked(model, tmp_path, "truncated:1", deepen=DEPTH)
    assert relative(got, want) == 0
    assert relative(less, want) > 1e-3


def test_a_share_of_the_gradient_runs_back_through_each_latent(model, tmp_path):
    coconut = {"name": "coconut", "num_latents": 6, "stop": "head"}
    found, losses = {}, set()
    for share in (0.0, 0.25, 1.0):
        out, found[share] = worked(model, tmp_path, "full", coconut, latents=1, latent_decay=share)
        losses.add(out.answer.item())
    assert len(losses) == 1
    mixed = {n: 0.75 * g + 0.25 * found[1.0][n] for n, g in found[0.0].items()}
    assert relative(found[0.25], mixed) < 1e-5  # one latent: linear in the share
    assert relative(found[0.0], found[1.0]) > 1e-3
    assert relative(worked(model, tmp_path, "truncated:0", coconut, latents=1)[1], found[0.0]) == 0


@pytest.mark.parametrize("detach", [False, True])
def test_gradients_on_the_cache_are_those_of_entering_everything_anew(model, tmp_path, detach):
    """The stock model, the whole prefix at every step, one row at a time."""
    K, think = 3, VEDAS
    out, got = worked(model, tmp_path, "truncated:0" if detach else "full", think)
    with VedasRun(recipe(think), model, tmp_path / "naive") as run, run.routed.off():
        model.train()
        batch = lesson(run)
        text, scale = model.model.language_model, float(run.think.learned.scale)
        side = batch.grids[0][0][0]
        whole, states = [], []
        for b, (groups, answer) in enumerate(zip(batch.groups, batch.answers, strict=True)):
            x = batch.inputs["inputs_embeds"][b : b + 1]
            places = batch.positions[:, b : b + 1]
            image = (batch.modality[b] == 1).nonzero().flatten().tolist()
            assert len(image) == side * side
            visited, place = set(), int(places.max()) + 1
            text.config._attn_implementation = "eager"
            for t in range(len(groups) + 1):
                end = t == len(groups)
                ids = torch.tensor([answer])
                if end:
                    x = torch.cat([x, text.embed_tokens(ids)], 1)
                    new = torch.arange(place, place + len(answer))
                    places = torch.cat([places, new.expand(3, 1, -1)], 2)
                h = text(
                    inputs_embeds=x, position_ids=places, attention_mask=torch.ones(x.shape[:2]), use_cache=False,
                    output_attentions=not end,
                )  # fmt: skip
                if end:
                    n = len(answer)
                    whole.append(model.lm_head(h.last_hidden_state[0, -n - 1 : -1]))
                    break
                state = h.last_hidden_state[0, -1]
                states.append((state, groups[t][-1]))
                row = torch.stack([a[0, :, -1].mean(0) for a in h.attentions]).mean(0)
                free = sorted((i for i in image if i not in visited), key=lambda i, r=row: (-float(r[i].detach()), i))
                picks = sorted(free[:K])
                visited |= set(picks)
                weight = row[picks] / row[picks].sum() * K
                copies, z = x[:, picks] * weight[None, :, None], state[None, None] * scale
                if detach:
                    copies, z = copies.detach(), z.detach()
                x = torch.cat([x, copies, z], 1)
                places = torch.cat([places, torch.arange(place, place + K + 1).expand(3, 1, -1)], 2)
                place += K + 1
        text.config._attn_implementation = "sdpa"
        labels = torch.tensor([i for answer in batch.answers for i in answer])
        answer = F.cross_entropy(torch.cat(whole), labels)
        heads = model.lm_head(torch.stack([s for s, _ in states]))
        supervised = F.cross_entropy(heads, torch.tensor([w for _, w in states]))
        assert abs((answer - out.answer).item()) < 1e-5
        assert abs((supervised - out.supervised).item()) < 1e-5
        want = gradients(run, dataclasses.replace(out, answer=answer, supervised=supervised, coherence=0.0))
    assert relative(got, want) < 1e-4  # float32 sums in another order


def test_recomputing_layers_in_the_backward_pass_changes_no_gradient(model, tmp_path):
    """The attention on the image is computed inside what is recomputed; the closer look learns through it."""
    found = []
    for checkpointing in (False, True):
        with VedasRun(recipe(deepen=DEPTH, recon_weight=1.0), model, tmp_path / str(checkpointing)) as run:
            model.train()
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            found.append(gradients(run, run.passes.work(lesson(run), "all")))
            model.activation_checkpointing_disable()
    assert relative(found[1], found[0]) == 0


def test_the_closer_look_teaches_the_language_model_and_never_the_tower(model, tmp_path):
    given = recipe(recon_weight=1.0)
    with VedasRun(given, model, tmp_path / "a") as run:
        model.train()
        out = run.passes.work(lesson(run), "all")
        out.coherence.backward()
        moved = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert all(f"model.language_model.layers.{i}.self_attn.{p}_proj.weight" in moved for i in (0, 3) for p in "qk")
        assert not any("visual" in n for n in moved)
        assert all(p.grad is not None for p in run.helpers.sr.parameters())
        assert out.coherence.item() > 0


def test_the_closer_look_weighs_the_same_on_a_tower_with_larger_tokens(model, tmp_path):
    """With tower and word embeddings 50 times as large, tokens, copies and closer look are too."""
    before, errors = {n: p.clone() for n, p in model.named_parameters()}, {}
    last = [p for n, p in model.named_parameters() if "visual.merger.mlp.2" in n or "embed_tokens" in n]
    assert len(last) == 3
    for relative in (True, False):
        for scale in (1, 50):
            with torch.no_grad():
                for n, p in model.named_parameters():
                    p.copy_(before[n] * (scale if any(p is each for each in last) else 1))
            with VedasRun(recipe(recon_weight=1.0, recon_relative=relative), model, tmp_path / f"{relative}") as run:
                errors[relative, scale] = run.passes.work(lesson(run), "all").coherence.item()
    assert errors[True, 50] == pytest.approx(errors[True, 1], rel=0.3)  # picks may differ
    assert errors[False, 50] > 100 * errors[False, 1]
