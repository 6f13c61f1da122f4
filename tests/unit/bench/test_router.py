"""What depth routers choose, against the same read off full traces position by position."""

import math
from statistics import fmean

import pytest

from mmroute.backbones.load import load
from mmroute.bench import router
from mmroute.bench.items import Plan, load_task
from mmroute.bench.router import measure_router
from mmroute.errors import ConfigError
from mmroute.recipe import Recipe, equip
from mmroute.tasks._texts import VOCABULARY
from mmroute.train.folder import write_folder
from mmroute.train.small_model import Shape, build

SMALL = {"hidden": 16, "layers": 4, "heads": 2, "kv_heads": 1, "mlp": 24, "mrope_section": (1, 1, 2),
         "vision_hidden": 16, "vision_mlp": 24}  # fmt: skip
THINK = {"name": "vedas", "num_latents": 2, "replay_tokens": 3, "max_new_tokens": 3}
DEPTH = {"name": "vedas", "deepen_tokens": 9, "chunk_tokens": 2, "scale_init": 0.2, "max_depth": 2}
PLAN = Plan(task="arrows:nano", n=5, batch=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    write_folder(path, build(Shape(**SMALL), VOCABULARY, 0), "x: 1\n", {})
    return load(path, dtype="float32")


def test_figures_are_those_of_full_traces(model):
    given = Recipe(name="r", think=THINK, deepen=DEPTH)
    found = measure_router(model, given, PLAN)
    task = load_task(PLAN.task)
    samples = list(task.samples("test", 5))
    with equip(model, given) as (routed, think):
        routed.full_trace = True
        traces = [routed.answer_many([task.messages(s, "latent")], think=think)[0].trace for s in samples]
    assert [layer.layer for layer in found.layers] == [1, 3]
    assert found.grid == (4, 4)
    chosen = {}
    for layer in found.layers:
        stood, again, places = {}, {}, [0] * 16
        both = picked = needed = 0
        for item, (sample, trace) in enumerate(zip(samples, traces, strict=True)):
            known = sample.meta["relevant"]
            must = {t for tiles in (known["start"], *(h.relevant for h in sample.hops), known["answer"]) for t in tiles}
            for number, call in enumerate(trace.calls[:3]):  # prompt and two latents; words do not go again
                redone = set((call.layers[layer.layer].redone or [[]])[0])
                seen = 0
                for i, modality in enumerate(call.modality[0]):
                    column = call.start + i
                    kind = "latent" if modality == 2 else ("text", "vision")[modality] if number == 0 else "copy"
                    stood[kind] = stood.get(kind, 0) + 1
                    again[kind] = again.get(kind, 0) + (column in redone)
                    if kind == "vision":
                        places[seen] += column in redone
                        picked += column in redone
                        both += column in redone and seen in must
                        seen += 1
                if number == 0:
                    chosen[layer.layer, item] = redone
            needed += len(must)
        assert layer.share == pytest.approx({k: again[k] / stood[k] for k in stood})
        assert layer.share["latent"] == 1, "a latent always goes again"
        assert set(layer.gate) == {k for k in stood if again[k]}
        assert all(0 < g < 1 for g in layer.gate.values())
        share = [p / sum(places) for p in places]
        assert layer.entropy == pytest.approx(-sum(p * math.log(p) for p in share if p) / math.log(16))
        assert layer.precision == pytest.approx(both / picked)
        assert layer.recall == pytest.approx(both / needed)
        assert layer.chance == pytest.approx(needed / 80)
        assert found.places[str(layer.layer)] == pytest.approx([p / 5 for p in places])
    pairs = [(chosen[1, i], chosen[3, i]) for i in range(5)]
    assert found.overlap == pytest.approx({"1-3": fmean(len(a & b) / len(a | b) for a, b in pairs)})
    assert len(router.lines(found)) == 5
    svg = router.picture(found)
    assert svg.count("<title>") == 32
    assert svg.count("<g transform") == 4


def test_running_everything_again_is_seen_as_that(model):
    found = measure_router(model, Recipe(name="r", think=THINK, deepen={"name": "uniform", "pick": "all"}), PLAN)
    for layer in found.layers:
        assert set(layer.share.values()) == {1.0}
        assert set(layer.gate.values()) == {1.0}
        assert layer.precision == layer.chance
        assert layer.recall == 1
        assert layer.entropy == pytest.approx(1)
    assert found.overlap == {"1-3": 1.0}


def test_what_deepens_nothing_is_refused_and_the_deepener_is_left_alone(model):
    with pytest.raises(ConfigError, match="recipe r has no deepener; use one whose `deepen` has"):
        measure_router(model, Recipe(name="r", think=THINK), PLAN)
    with equip(model, Recipe(name="r", think=THINK, deepen=DEPTH)) as (routed, _):
        deepener = routed.controller.deepener
        with router.watching(deepener):
            assert "again" in vars(deepener)
        assert "again" not in vars(deepener)
