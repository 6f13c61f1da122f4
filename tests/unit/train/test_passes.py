"""Lessons that do not fit: fewer steps than latents, images too small for the window, more copies than an image has, no
latents at all. Each is defined, and what cannot be is refused with what to do.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import mmroute
from mmroute import recipe as recipes
from mmroute.backbones.load import load
from mmroute.errors import ConfigError
from mmroute.tasks._texts import VOCABULARY
from mmroute.train.coherence import Window, closer_look
from mmroute.train.examples import IGNORED
from mmroute.train.folder import write_folder
from mmroute.train.small_model import Shape, build
from mmroute.train.vedas import VedasRun

SMALL = {"hidden": 16, "layers": 2, "heads": 2, "kv_heads": 1, "mlp": 24, "mrope_section": (1, 1, 2),
         "vision_hidden": 16, "vision_mlp": 24}  # fmt: skip
VEDAS = {"name": "vedas", "num_latents": 9, "stop": "head", "replay_tokens": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    write_folder(path, build(Shape(**SMALL), VOCABULARY, 0), "x: 1\n", {})
    return load(path, dtype="float32")


def opened(model, folder, think=VEDAS, **train):
    given = {"tasks": {"arrows:nano": 1}, "stages": [{"name": "x", "steps": 1}], **train}
    return VedasRun(recipes.Recipe(name="t", think=think, train=given), model, folder / "run")


def lesson(run, length=None):
    task = run.tasks["arrows:nano"]
    drawn = run._drawn(np.random.default_rng(0), 2)
    if length is not None:
        rng = np.random.default_rng(1)
        drawn = [(task, task.stream(rng, task.sizes[0], n)) for n in length]
    return run.teacher.lesson(drawn, "latent")


@pytest.mark.parametrize("stop", ["head", "fixed"])
def test_items_with_fewer_steps_than_latents_write_their_answer_alone(model, tmp_path, stop):
    """A stage of 5 latents, rows of 2 and 4 states: by the head a row takes as many as it has, else all take 5."""
    with opened(model, tmp_path, {**VEDAS, "stop": stop}) as run:
        run.model.train()
        batch = lesson(run, (1, 3))
        assert [len(groups) for groups in batch.groups] == [2, 4]
        counts = run.passes.counts([2, 4], 5)
        assert counts == ([2, 4] if stop == "head" else [5, 5])
        _, H, labels = run.passes.chunks(batch, counts, [2, 4], training=True)
        assert [row[row != IGNORED].tolist() for row in labels] == batch.answers
        assert H.isfinite().all()
        out = run.passes.work(batch, 5)
        (out.answer + out.supervised).backward()
        grads = [p.grad for p in run.model.parameters() if p.grad is not None]
        assert all(g.isfinite().all() for g in grads)
        run.model.zero_grad(set_to_none=True)
        if stop == "head":
            assert torch.equal(run.passes.work(batch, "all").answer, out.answer)


def test_more_copies_than_the_image_has_copy_what_is_left_and_teach(model, tmp_path):
    with opened(model, tmp_path, {**VEDAS, "replay_tokens": 50}, recon_weight=1.0) as run:
        run.model.train()
        out = run.passes.work(lesson(run), "all")
        (out.answer + out.coherence).backward()
        assert out.coherence > 0
        assert all(p.grad.isfinite().all() for p in run.model.parameters() if p.grad is not None)
        run.model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("cells", [(40, 40), (1, 1)])
def test_a_window_larger_than_the_image_is_the_image(model, tmp_path, cells):
    with opened(model, tmp_path, recon_weight=1.0, window_cells=cells) as run:
        run.model.train()
        assert run.passes.work(lesson(run), "all").coherence.isfinite()


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (200, 1)])
def test_a_picture_of_fewer_pixels_than_tokens_can_be_looked_at_closer(size, tiny_folder):
    model = mmroute.load(tiny_folder("qwen2_5_vl"))
    with mmroute.attach(model) as routed:
        windows = [Window(0, 0, 0, 1, 1), Window(0, 3, 3, 1, 1)]
        out = closer_look(routed, [Image.new("RGB", size, "red")] * 2, windows, [(4, 4)] * 2)
    assert out.shape[0] == 2
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["coconut", "vedas", "pause"])
def test_without_latents_stages_that_replace_something_are_refused(model, tmp_path, name):
    with opened(model, tmp_path, {"name": name, "num_latents": 0}) as run:
        batch = lesson(run)
        assert run.passes.work(batch, 0).answer.isfinite(), "nothing is replaced: a written chain"
        with pytest.raises(ConfigError, match=r"think\.num_latents allows 0 latents of 1 each; raise it to \d"):
            run.passes.work(batch, 1)


def test_no_latent_per_group_is_answering_at_once(model, tmp_path):
    with opened(model, tmp_path, {"name": "coconut", "num_latents": 0}, latents_per_group=0) as run:
        batch = lesson(run)
        out = run.passes.work(batch, "all")
        assert out.supervised == 0
        _, H, labels = run.passes.chunks(batch, [0, 0], [len(g) for g in batch.groups], training=False)
        assert [row[row != IGNORED].tolist() for row in labels] == batch.answers
        want = F.cross_entropy(run.passes.head(H).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        assert out.answer.item() == pytest.approx(want.item(), rel=1e-5)
