"""Gradients by kind of position: each is what moving the state there does to the loss, in whatever batch."""

from statistics import fmean, median

import pytest
import torch
import torch.nn.functional as F

from mmroute.backbones.load import load
from mmroute.bench import gradients
from mmroute.bench.gradients import KINDS, measure_gradients, norms_of
from mmroute.bench.items import Plan
from mmroute.bench.lessons import opened
from mmroute.errors import ConfigError
from mmroute.recipe import Recipe
from mmroute.tasks._texts import VOCABULARY
from mmroute.train.examples import IGNORED
from mmroute.train.folder import write_folder
from mmroute.train.small_model import Shape, build

SMALL = {"hidden": 16, "layers": 3, "heads": 2, "kv_heads": 1, "mlp": 24, "mrope_section": (1, 1, 2),
         "vision_hidden": 16, "vision_mlp": 24}  # fmt: skip
GIVEN = Recipe(name="r", think={"name": "vedas", "num_latents": 6, "stop": "head", "replay_tokens": 2})
PLAN = Plan(task="arrows:nano", n=3, batch=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    write_folder(path, build(Shape(**SMALL), VOCABULARY, 0), "x: 1\n", {})
    return load(path, dtype="float32")


def test_a_norm_is_how_steeply_the_loss_rises_with_the_state(model):
    """Finite differences along every axis, one item, one stage, at three positions of two layers."""
    with opened(model, GIVEN, Plan(task="arrows:nano", n=1, batch=1)) as study:
        model.train()
        _, lesson = next(study.lessons())
        kinds, norms = norms_of(study, lesson, 2)
        layers = model.model.language_model.layers
        replaced = [min(2, len(lesson.groups[0]))]
        prompt = lesson.ids.shape[1]

        def loss(layer, call, place, axis, by):
            seen = []

            def push(module, args, out):
                seen.append(1)
                if len(seen) - 1 != call:
                    return out
                out = out.clone()
                out[0, place, axis] += by
                return out

            handle = layers[layer].register_forward_hook(push)
            try:
                with torch.no_grad():
                    _, H, labels = study.passes.chunks(lesson, [2], replaced, training=True)
            finally:
                handle.remove()
            learned = labels != IGNORED
            return F.cross_entropy(study.passes.head(H[learned]).detach(), labels[learned]).item()

        # In the prompt, the first step's latent behind two copies, and the last but one of what is written.
        for layer, call, place, column in ((0, 0, 4, 4), (1, 1, 2, prompt + 2), (1, 3, 0, prompt + 6)):
            slope = [(loss(layer, call, place, d, 2e-2) - loss(layer, call, place, d, -2e-2)) / 4e-2 for d in range(16)]
            want = torch.tensor(slope).norm()
            assert float(norms[layer, 0, column]) == pytest.approx(float(want), rel=0.05, abs=1e-4)
            assert norms[layer, 0, column] > 0
        model.requires_grad_(False)
        _, frozen = norms_of(study, lesson, 2)
        model.requires_grad_(True).eval()
    torch.testing.assert_close(frozen, norms, rtol=1e-4, atol=1e-6)
    assert [KINDS[kinds[0, i]] for i in (0, 4, prompt + 1, prompt + 2, kinds.shape[1] - 1)] == [
        "system", "visual", "replay", "latent", "answer",
    ]  # fmt: skip


def test_positions_are_named_by_what_they_hold(model):
    with opened(model, GIVEN, PLAN) as study:
        model.train()
        _, lesson = next(study.lessons())
        for stage in (0, 1, 9):
            kinds, norms = norms_of(study, lesson, stage)
            for b, groups in enumerate(lesson.groups):
                gone = min(stage, len(groups))
                count = [int((kinds[b] == i).sum()) for i in range(len(KINDS))]
                text = int((lesson.mask[b].bool() & (lesson.modality[b] == 0)).sum())
                assert count[0] + count[2] == text
                assert min(count[0], count[2]) > 0
                rest = sum(map(len, groups[gone:]))
                assert count[1:2] + count[3:] == [16, 2 * gone, gone, rest, len(lesson.answers[b])]
            assert not norms[:, kinds == -1].any()
        model.eval()


def test_the_report_sums_up_what_single_items_give(model):
    was = model.training
    found = measure_gradients(model, GIVEN, PLAN)
    assert model.training is was
    values = {}
    with opened(model, GIVEN, Plan(task="arrows:nano", n=3, batch=1)) as study:
        model.train()
        lessons = [lesson for _, lesson in study.lessons()]
        for stage in (0, 1):
            for lesson in lessons:
                kinds, norms = norms_of(study, lesson, stage)
                for layer in range(3):
                    for kind, norm in zip(kinds[0].tolist(), norms[layer, 0].tolist(), strict=True):
                        if kind >= 0:
                            values.setdefault((stage, layer, KINDS[kind]), []).append(norm)
        model.eval()
    assert list(found.stages)[-1] == "all"
    assert set(found.stages["0"]) == {"system", "visual", "question", "step", "answer"}
    for (stage, layer, kind), own in values.items():
        got = found.stages[str(stage)][kind][layer]
        every = sum(sum(v) for (s, n, _), v in values.items() if (s, n) == (stage, layer))
        assert got.count == len(own)
        assert got.mean == pytest.approx(fmean(own), rel=1e-3)
        assert got.median == pytest.approx(median(own), rel=1e-2, abs=1e-7)
        assert got.share == pytest.approx(sum(own) / every, rel=1e-3)
    assert len(gradients.lines(found)) == 2 + len(found.stages)
    svg = gradients.picture(found)
    assert svg.count("<g transform") == len(found.stages) + 3
    assert "visual" in svg


def test_what_has_no_latents_or_no_world_is_refused(model):
    with pytest.raises(ConfigError, match="recipe r takes no latent steps"):
        measure_gradients(model, Recipe(name="r"), PLAN)
    short = Recipe(name="r", think={"name": "coconut", "num_latents": 1, "stop": "head"})
    with pytest.raises(ConfigError, match=r"raise it to \d"):
        measure_gradients(model, short, PLAN)
