"""Nuclear norms are those of the matrices, of the half of a batch they stand for, and leave the model alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmroute import recipe as recipes
from mmroute.backbones.load import load
from mmroute.bench import nuclear
from mmroute.bench.items import Plan
from mmroute.bench.lessons import specs_of
from mmroute.bench.nuclear import NuclearTracker, measure_nuclear, spectrum
from mmroute.errors import ConfigError
from mmroute.tasks._texts import VOCABULARY
from mmroute.train.folder import write_folder
from mmroute.train.small_model import Shape, build
from mmroute.train.vedas import VedasRun

SMALL = {"hidden": 16, "layers": 2, "heads": 2, "kv_heads": 1, "mlp": 24, "mrope_section": (1, 1, 2),
         "vision_hidden": 16, "vision_mlp": 24}  # fmt: skip
STAGES = [{"name": "one", "latents": 1, "steps": 9}, {"name": "all", "steps": 9, "supervise": [[0, 1.0]], "warmup": 1}]
GIVEN = recipes.Recipe(
    name="r",
    think={"name": "coconut", "num_latents": 6, "stop": "head"},
    train={"tasks": {"maze": 1}, "stages": STAGES},
)
PLAN = Plan(task="arrows:nano", n=9, batch=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    write_folder(path, build(Shape(**SMALL), VOCABULARY, 0), "x: 1\n", {})
    return load(path, dtype="float32")


def nuc(matrix):
    return float(torch.linalg.matrix_norm(matrix.double(), "nuc"))


def test_a_spectrum_is_that_of_the_matrix_and_of_a_product():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(7, 3, generator=generator), torch.randn(3, 5, generator=generator)
    for got in (spectrum(left @ right), spectrum(left, right)):
        assert got.nuclear == pytest.approx(nuc(left @ right), rel=1e-5)
        assert got.spectral == pytest.approx(float(torch.linalg.matrix_norm(left @ right, 2)), rel=1e-5)
        s = torch.linalg.svdvals((left @ right).double())
        assert got.effective_rank == pytest.approx(float(s.sum() ** 2 / s.square().sum()), rel=1e-4)
    assert spectrum(torch.zeros(2, 2)).effective_rank == 0


@pytest.mark.parametrize("backbone", ["full", "lora"])
def test_a_tracker_sees_what_each_half_added_and_what_the_weights_moved(model, tmp_path, backbone):
    given = replace(GIVEN, train={"tasks": {"arrows:nano": 1}, "stages": STAGES, "backbone": backbone, "lora_rank": 2})
    with VedasRun(given, model, tmp_path / "run") as run:
        tracker = NuclearTracker(run.model, run.routed.family)
        halves = [run._drawn(np.random.default_rng(i), 2) for i in range(2)]
        seen, total = [], {}
        run.model.train()
        for drawn in halves:
            run.passes.work(run.teacher.lesson(drawn, "latent"), "all").answer.backward()
            seen.append(tracker.gradients())
        key = ("v", 1)
        module = run.model.model.language_model.layers[1].self_attn.v_proj
        matrices = [module.weight] if backbone == "full" else [module.lora_A["default"].weight,
                                                               module.lora_B["default"].weight]  # fmt: skip
        total = [m.grad.clone() for m in matrices]
        run.model.zero_grad(set_to_none=True)
        run.passes.work(run.teacher.lesson(halves[1], "latent"), "all").answer.backward()
        second = [m.grad for m in matrices]
        assert seen[1][key].nuclear == pytest.approx(sum(map(nuc, second)), rel=1e-3)
        first = [a - b for a, b in zip(total, second, strict=True)]
        assert seen[0][key].nuclear == pytest.approx(sum(map(nuc, first)), rel=1e-3)

        def whole():
            return module.weight.detach().clone() if backbone == "full" else module.get_delta_weight("default").detach()

        before = whole()
        run.learners.step(1.0, run.stage)
        moved = tracker.updates()
        assert moved[key].nuclear == pytest.approx(nuc(whole() - before), rel=1e-3, abs=1e-6)
        assert tracker.updates()[key].nuclear == pytest.approx(0, abs=1e-5), "nothing since"


def test_easy_items_are_right_more_often_and_the_first_gradient_is_that_of_their_half(model, tmp_path):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found, right = measure_nuclear(model, GIVEN, PLAN, steps=2, checks=2)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert found.stages == ["one", "one", "all", "all"]
    assert len(found.easy) == len(found.hard) == 3
    assert not set(found.easy) & set(found.hard)
    rank = [(-right[i][0], right[i][1]) for i in found.easy + found.hard]
    assert max(rank[:3]) <= min(rank[3:])
    assert set(found.tracks) == {"easy", "hard", "update"}
    for rows in found.tracks.values():
        for p in "qkvo":
            assert len(rows[p]) == 2
            for track in rows[p]:
                assert len(track.nuclear) == 4
                assert track.mean == pytest.approx(np.mean(track.nuclear))
                assert track.std == pytest.approx(np.std(track.nuclear))
                assert track.volatility == pytest.approx(track.std / track.mean)
    task, samples, specs = specs_of(PLAN)
    of = {s.id: spec for s, spec in zip(samples, specs, strict=True)}
    rng = np.random.default_rng([PLAN.seed, 0])
    with VedasRun(replace(GIVEN, train={**GIVEN.train, "tasks": {PLAN.task: 1}}), model, tmp_path / "naive") as run:
        run.model.train()
        for what, ids in (("easy", found.easy), ("hard", found.hard)):
            drawn = [(task, of[ids[i]]) for i in rng.choice(3, 2, replace=False)]
            run.model.zero_grad(set_to_none=True)
            (0.5 * run.passes.work(run.teacher.lesson(drawn, "latent"), 1).answer).backward()
            for i, layer in enumerate(model.model.language_model.layers):
                for p in "qkvo":
                    grad = getattr(layer.self_attn, f"{p}_proj").weight.grad
                    assert found.tracks[what][p][i].nuclear[0] == pytest.approx(nuc(grad), rel=1e-3, abs=1e-7)
    again, _ = measure_nuclear(model, GIVEN, PLAN, steps=1, right=right)
    assert (again.easy, again.hard) == (found.easy, found.hard)
    assert len(nuclear.lines([found, again])) == 10
    assert nuclear.picture([found, again]).count("<polyline") == 16


def test_too_few_items_and_frozen_attention_are_refused(model):
    with pytest.raises(ConfigError, match="n >= 6, batch >= 2"):
        measure_nuclear(model, GIVEN, replace(PLAN, n=5))
    frozen = replace(GIVEN, train={**GIVEN.train, "backbone": "frozen"}, deepen={"name": "vedas"})
    with pytest.raises(ConfigError, match="no weight of the attention is trained"):
        measure_nuclear(model, frozen, PLAN, steps=1, right={s.id: (0.0, 0.0) for s in specs_of(PLAN)[1]})
