"""One evaluation from items to files, on a random model and a task of a few lines. No test asserts seconds."""

import json
from typing import ClassVar

import pytest
from PIL import Image

from mmroute import cost, hub
from mmroute.backbones.load import load
from mmroute.bench import run, schema, timing
from mmroute.cli.evaluate import evaluate
from mmroute.errors import ConfigError, InputError
from mmroute.recipe import equip, read
from mmroute.tasks.base import Choice, Hop, Sample, Score, Task
from mmroute.train.delta import fingerprint

SHORT = ["think.name=text", "think.max_new_tokens=6"]


class Colours(Task):
    """Plain pictures; an answer is right if it is of even length, which random models do at times."""

    name: ClassVar[str] = "colours"
    size = 30_000

    def __init__(self, preset: str = "small") -> None:
        self.preset = preset

    def samples(self, split, n=None, offset=0):
        if split != "test":
            raise ConfigError(f"split is test, given {split!r}")
        for i in range(offset, min(offset + n, self.size)):
            yield Sample(
                id=f"colours-{i}",
                task=self.name,
                split=split,
                group=f"pair-{i // 2}",
                question=f"Which colour is it, {i}?",
                images=[Image.new("RGB", (24, 24 + 8 * (i % 2)), (i * 9 % 255, 40, 90))],
                prompt_images=[0],
                hops=[Hop("look", relevant=[0])],
                choices=[Choice("red"), Choice("blue")],
                answer="red",
                answer_index=0,
                answer_text="red",
                difficulty={"level": "hard" if i % 3 else "easy", "hops": (2, 9, 10)[i % 3]},
                meta={"canvas": [3, 3, 8], "board": [0, 1, 2], "relevant": {"start": [4], "answer": [5]}},
            )

    def messages(self, sample, style=None):
        image = {"type": "image", "image": sample.images[0]}
        return [{"role": "user", "content": [image, {"type": "text", "text": f"{sample.question} {style}"}]}]

    def score(self, sample, completion, scorer=None):
        return Score(float(len(completion) % 2 == 0), completion, True, "even")


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load(tiny_folder("qwen2_5_vl"))


@pytest.fixture(scope="module", autouse=True)
def _colours():
    """The registry knows `colours` too."""
    real = hub.load

    def load_too(kind, name, **given):
        return Colours(**given) if name == "colours" else real(kind, name, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "load", load_too)
        yield


def plan(**changes) -> run.Plan:
    quick = {"task": "colours", "n": 5, "batch": 2, "rounds": 2, "warmup": 1, "forced_tokens": 3, "timed_items": 2}
    return run.Plan(**{**quick, **changes})


@pytest.fixture(scope="module")
def found(model):
    pruned = read("random", [*SHORT, "prune.vision_keep=0.4", "prune.text_keep=0.7"])
    return run.evaluate(model, pruned, plan(), against=read("none", SHORT), name="tiny", command="test")


def test_the_summary_compares_on_the_same_items(found):
    line = found.summary.to_dict()
    assert line["recipe"] == "random"
    assert line["baseline"]["recipe"] == "none"
    assert line["n"] == line["baseline"]["n"] == 5
    assert line["keep"]["vision"] == pytest.approx(0.45, abs=0.1)
    assert line["baseline"]["keep"] == {"vision": 1.0, "text": 1.0}
    assert line["ratio"]["flops"] == line["flops"] / line["baseline"]["flops"] < 1
    assert line["ratio"]["kv_bytes"] == line["kv_bytes"] / line["baseline"]["kv_bytes"] < 1
    assert line["ratio"]["prefill"] > 0 < line["ratio"]["decode"]
    assert found.result.task.ids_sha256 == found.baseline.task.ids_sha256


def test_results_survive_their_files(found, tmp_path):
    for side in (found.result, found.baseline):
        schema.write_result(tmp_path / "r.json", side)
        assert schema.read_result(tmp_path / "r.json") == side


def test_quality_and_the_paired_difference_follow_the_scores(found):
    ours, theirs = (list(map(int, side.quality.correct)) for side in (found.result, found.baseline))
    assert found.result.quality.accuracy == sum(ours) / 5
    assert set(found.result.quality.by_level) == {"easy", "hard"}
    by_hops = {"2": (ours[0] + ours[3], 2), "9": (ours[1] + ours[4], 2), "10": (ours[2], 1)}
    assert list(found.result.quality.by_hops.items()) == list(by_hops.items())
    compared = found.result.baseline
    assert compared.diff == pytest.approx((sum(ours) - sum(theirs)) / 5)
    assert compared.only_ours - compared.only_theirs == sum(ours) - sum(theirs)
    assert found.baseline.baseline is None


def test_costs_are_those_of_the_traces(model):
    outcome = run.answer_items(model, read("none", SHORT), Colours(), list(Colours().samples("test", 3)), batch=2)
    for answer in outcome.answers:
        first = answer.trace.calls[0]
        length = sum(first.new[0])
        assert length == answer.prompt_tokens
        planned = cost.planned_trace(answer.trace.shape, first.new, decode_steps=answer.ar_steps - 1)
        assert cost.estimate_flops(answer.trace) == cost.estimate_flops(planned)
        assert cost.estimate_kv_bytes(answer.trace) == cost.estimate_kv_bytes(planned)
    assert outcome.flops_tower > 0


def test_a_batch_changes_no_answer(model):
    samples = list(Colours().samples("test", 5))
    recipe = read("random", SHORT)
    alone, together = (run.answer_items(model, recipe, Colours(), samples, batch) for batch in (1, 4))
    assert [a.ids for a in alone.answers] == [a.ids for a in together.answers]
    assert [cost.estimate_flops(a.trace) for a in alone.answers] == [
        cost.estimate_flops(a.trace) for a in together.answers
    ]


def test_the_oracle_gets_the_truth(model):
    found = run.evaluate(model, read("oracle", SHORT), plan(n=2))
    assert found.summary.keep["vision"] == pytest.approx(0.5, abs=0.1)
    assert found.baseline is None
    assert "ratio" not in found.summary.to_dict()


def test_the_model_is_stock_again_afterwards(model, found):
    assert "_mmroute" not in model.__dict__
    assert "mmroute" not in dict(model.named_children())


def test_seeds_are_different_items():
    first, second = (run.draw(Colours(), plan(seed=seed)) for seed in (0, 1))
    assert not {s.id for s in first} & {s.id for s in second}
    assert [s.id for s in first] == [s.id for s in run.draw(Colours(), plan())]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n": 0}, ConfigError, "n in 1"),
        ({"n": 20_000}, ConfigError, "n in 1"),
        ({"batch": 0}, ConfigError, "batch >= 1"),
        ({"seed": -1}, ConfigError, "seed >= 0"),
        ({"seed": 3}, InputError, "0 items from seed 3 on, 5 were asked"),
    ],
)
def test_plans_that_cannot_be_met_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        run.draw(Colours(), plan(**changes))


def test_chains_that_are_too_short_are_passed_over():
    task = run.load_task("maze")
    long = [s.id for s in task.samples("test", 60) if len(s.hops) >= 10]
    assert [s.id for s in run.draw(task, run.Plan("maze", len(long), min_hops=10))] == long != []
    with pytest.raises(InputError, match="0 items of 99 hops or more"):
        run.draw(Colours(), plan(seed=2, min_hops=99))


def test_a_preset_is_named_behind_a_colon():
    assert run.load_task("colours:wide").preset == "wide"
    assert run.load_task("colours").preset == "small"


def test_items_without_gold_answers_are_refused(model, monkeypatch):
    monkeypatch.setattr(Colours, "score", lambda *_: Score(None, "red", True, "none"))
    with pytest.raises(InputError, match="no gold answer"):
        run.answer_items(model, read("direct"), Colours(), list(Colours().samples("test", 1)), batch=1)


def test_the_card_shows_both_sides_and_the_ratio(found):
    text = "\n".join(run.lines(found))
    assert "random " in text
    assert "none " in text
    assert "ratio to none: FLOPs 0." in text


def test_progress_is_told_per_batch(model):
    told = []
    samples = list(Colours().samples("test", 3))
    run.answer_items(model, read("direct", SHORT), Colours(), samples, 2, lambda *seen: told.append(seen))
    assert told == [("direct", 2, 3), ("direct", 3, 3)]


def test_a_recipe_that_only_thinks_is_timed_on_the_stock_cache(model, monkeypatch):
    caches = []
    real = timing.measure_generation

    def spy(given, batch, tokens, **options):
        caches.append("_mmroute" in given.__dict__)
        return real(given, batch, tokens, **options)

    monkeypatch.setattr(timing, "measure_generation", spy)
    recipes = [read("direct"), read("random")]
    run.measure_recipes(model, recipes, Colours(), list(Colours().samples("test", 2)), plan(rounds=1, warmup=0))
    assert caches == [False, True]


def test_the_command_ends_stdout_with_one_json_line_and_writes_both_sides(tiny_folder, tmp_path, capsys):
    out = tmp_path / "runs" / "oracle.json"
    evaluate(
        task="colours",
        recipe="oracle",
        n=2,
        seed=1,
        against="direct",
        model=str(tiny_folder("qwen2_5_vl")),
        batch=2,
        split="test",
        rounds=1,
        out=out,
        set_=SHORT,
        json_=True,
    )
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    summary = json.loads(line)
    assert (summary["recipe"], summary["baseline"]["recipe"], summary["seed"]) == ("oracle", "direct", 1)
    assert "ratio to direct" in printed.err
    assert schema.read_result(out).method.recipe == "oracle"
    assert schema.read_result(out.with_name("oracle--against-direct.json")).method.recipe == "direct"


def test_the_command_reports_a_wrong_task_before_it_loads_a_model():
    with pytest.raises(ConfigError, match="no task named 'colors'"):
        evaluate(task="colors", recipe="none", n=1, seed=0, against="", model="absent", batch=1, split="test", set_=[])


@pytest.mark.parametrize(
    ("setting", "message"), [("task.hop_images=drawn", r"tasks\.maze\.hop_images"), ("context=markov2", "context is")]
)
def test_the_command_hands_settings_to_the_task_before_it_loads_a_model(setting, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(task="maze", recipe="none", n=1, seed=0, model="absent", batch=1, split="test", set_=[setting])


def test_both_files_say_which_weights_answered_and_whose_routers(model, tmp_path):
    options = ["prune.first_layer=0", "prune.cutoff_layer=3", "think.max_new_tokens=3"]
    with equip(model, read("dare-lh", [*options, "trained=null"])) as (routed, _):
        routed.controller.pruner.export()
        routed.save_pretrained(tmp_path / "router")
    router = str(tmp_path / "router")
    ours = read("dare-lh", [*options, f"trained={router}"])
    found = run.evaluate(model, ours, plan(n=2, rounds=1), against=read("none", SHORT))
    assert found.baseline is not None
    assert (found.result.model.trained, found.baseline.model.trained) == (router, "none")
    weights = fingerprint(dict(model.named_parameters()))
    assert found.result.model.weights_sha256 == found.baseline.model.weights_sha256 == weights
