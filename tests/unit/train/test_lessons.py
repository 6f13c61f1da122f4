"""Lessons of a latent run: how chains are drawn and cut, what replaces them, and what their latents are told."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from latent_runs import VEDAS, lesson, recipe

from mmroute.errors import ConfigError
from mmroute.tasks._texts import VOCABULARY
from mmroute.train.examples import IGNORED
from mmroute.train.vedas import VedasRun


def test_stages_replace_the_first_groups_and_leave_the_rest_written(model, tmp_path):
    with VedasRun(recipe(), model, tmp_path / "a") as run:
        batch = lesson(run)
        answer = [run.teacher.index["answer:"]]
        for replaced in range(4):
            here = [min(replaced, len(g)) for g in batch.groups]
            _, labels = run.passes.rest(batch, here)
            for b, groups in enumerate(batch.groups):
                want = [i for g in groups[here[b] :] for i in g] + batch.answers[b]
                assert labels[b][labels[b] != IGNORED].tolist() == want
        assert [a[0] for a in batch.answers] == answer * 3
        keep = run.passes.work(batch, "all", keep_last=True)
        assert len(keep.right) == 3


def test_a_rationale_is_cut_as_the_recipe_says(model, tmp_path):
    def groups(number, **changes):
        with VedasRun(recipe(tasks={"frozenlake:nano": 1}, **changes), model, tmp_path / f"{number}") as run:
            task = run.tasks["frozenlake:nano"]
            spec = next(s for i in range(99) if len(task.chain(s := task.spec("val", i))) == 3)
            cut = run.teacher.lesson([(task, spec)], "latent").groups[0]
            return [[VOCABULARY[i] for i in group] for group in cut], task, spec

    states, task, spec = groups(0)
    first, *hops = task.outcomes(spec)
    assert states == [[word] for step in [first, *hops] for word in step]
    assert groups(1, steps="outcomes")[0] == [first, *hops]
    assert groups(2, steps="chain")[0] == task.chain(spec)
    assert groups(3, steps="sentences")[0] == task.sentences(spec)
    assert groups(4, steps="outcomes", steps_per_group=2)[0] == [[*first, *hops[0]], hops[1]]
    assert groups(5, steps="outcomes", steps_per_group=2, groups=1)[0] == [[*first, *hops[0], *hops[1]]]


@pytest.mark.parametrize("head", ["first", "last"])
def test_readouts_read_the_words_of_a_group_that_the_head_does_not(model, tmp_path, head):
    coconut = {"name": "coconut", "num_latents": 6, "stop": "head"}
    pairs = {"steps_per_group": 3, "readout_weight": 0.5, "head_reads": head}
    with VedasRun(recipe(coconut, **pairs), model, tmp_path / "a") as run:
        batch = next(b for i in range(9) if len((b := lesson(run, seed=i)).groups[0][0]) == 3)
        rollout, *_ = run.passes.chunks(batch, [len(g) for g in batch.groups], [len(g) for g in batch.groups], False)
        maps, losses = run.helpers.readout.maps, []
        assert torch.equal(maps[0], torch.eye(len(maps[0])))
        maps.data += torch.randn(maps.shape, generator=torch.Generator().manual_seed(0))
        out = run.passes.work(batch, "all")
        own = []
        for b, groups in enumerate(batch.groups):
            for t, group in enumerate(groups):
                others = group[:-1] if head == "last" else group[1:]
                word = group[0] if head == "first" else group[-1]
                own.append(F.cross_entropy(run.passes.head(rollout.fed[t][b])[None], torch.tensor([word])))
                for j, word in enumerate(reversed(others)):
                    logits = run.passes.head(maps[j] @ rollout.fed[t][b].float())
                    losses.append(F.cross_entropy(logits[None], torch.tensor([word])))
        assert out.supervised.item() == pytest.approx(torch.stack(own).mean().item(), rel=1e-4)
        assert out.readout.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
        assert run.loss(out, 2.0).item() == pytest.approx((out.answer + 2 * (out.supervised + out.readout / 2)).item())
        before = maps.detach().clone()
        run.loss(out, 1.0).backward()
        run.learners.step(1.0, run.stage)
        assert not torch.equal(maps[0], before[0])


def test_readouts_of_an_inner_layer_teach_the_layers_up_to_it(model, tmp_path):
    coconut = {"name": "coconut", "num_latents": 6, "stop": "head"}
    pairs = {"steps_per_group": 2, "readout_weight": 0.5}

    def readout(name, layer):
        with VedasRun(recipe(coconut, **pairs, readout_layer=layer), model, tmp_path / name) as run:
            read = run.passes.work(lesson(run), 1).readout  # one latent: later ones are fed what all layers made
            read.backward()
            taught = [m.mlp.up_proj.weight.grad for m in run.routed.family.text_model(model).layers]
            return read.item(), [grad is not None and bool(grad.any()) for grad in taught]

    count = len(model.model.language_model.layers)
    last, taught = readout("last", None)
    assert taught == [True] * count
    assert readout("by-number", count) == (pytest.approx(last, rel=1e-5), taught)
    model.zero_grad()
    inner, taught = readout("inner", 2)
    assert taught == [True] * 2 + [False] * (count - 2)
    assert inner != pytest.approx(last, rel=1e-3)
    message = rf"readout_layer is {count + 1}, the model has {count} layers"
    beyond = VedasRun(recipe(coconut, **pairs, readout_layer=count + 1), model, tmp_path / "beyond")
    with beyond as run, pytest.raises(ConfigError, match=message):
        run.passes.work(lesson(run), "all")


def test_a_thought_that_its_own_head_would_end_early_is_not_right(model, tmp_path):
    coconut = {"name": "coconut", "num_latents": 6, "stop": "head"}
    with VedasRun(recipe(coconut), model, tmp_path / "a") as run, torch.no_grad():
        batch = lesson(run)
        counts = [len(g) for g in batch.groups]
        rollout, *_ = run.passes.chunks(batch, counts, counts, False)
        read = [run.passes.head(state).argmax(-1).tolist() for state in rollout.fed]
        for word in sorted({i for row in read for i in row}):
            run.think.config = dataclasses.replace(run.think.config, answer_cue=VOCABULARY[word])
            want = [any(read[t][b] == word for t in range(1, counts[b])) for b in range(len(counts))]
            assert run.passes.ends_early(rollout, counts).tolist() == want
        run.think.config = dataclasses.replace(run.think.config, stop="fixed")
        assert not run.passes.ends_early(rollout, counts).any()


def test_fewer_latents_than_states_is_refused_with_the_number_needed(model, tmp_path):
    message = r"num_latents allows 1 latents of 1 each; raise it to \d"
    short = VedasRun(recipe({**VEDAS, "num_latents": 1}), model, tmp_path / "a")
    with short as run, pytest.raises(ConfigError, match=message):
        run.passes.work(lesson(run), "all")
    with VedasRun(recipe({**VEDAS, "num_latents": 1}, groups=1), model, tmp_path / "b") as run:
        assert run.passes.work(lesson(run), "all").answer.isfinite()


def test_long_chains_are_drawn_more_often_where_asked(model, tmp_path):
    means = []
    for power in (0.0, 3.0):
        with VedasRun(recipe(length_power=power), model, tmp_path / f"{power}") as run:
            drawn = [run._drawn(np.random.default_rng(i), 1)[0] for i in range(60)]
            means.append(np.mean([len(task.chain(spec)) for task, spec in drawn]))
    assert means[1] > means[0] + 0.3
