"""The trainer of latents: gradients of each mode against the longest way, stages, resuming, and what is saved."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mmroute import recipe as recipes
from mmroute.backbones.load import load
from mmroute.bench.items import load_task
from mmroute.engine.saving import from_pretrained
from mmroute.errors import CheckpointMismatch, ConfigError, InputError
from mmroute.recipe import equip
from mmroute.tasks._texts import VOCABULARY
from mmroute.train.curriculum import read_recipe
from mmroute.train.delta import tuned
from mmroute.train.examples import IGNORED
from mmroute.train.folder import write_folder
from mmroute.train.small_model import Shape, build
from mmroute.train.vedas import VedasRun, train_vedas

SMALL = {
    "hidden": 32,
    "layers": 4,
    "heads": 2,
    "kv_heads": 1,
    "mlp": 48,
    "mrope_section": (2, 3, 3),
    "vision_hidden": 32,
    "vision_mlp": 48,
}
STAGES = [
    {"name": "written", "latents": 0, "steps": 2, "written": 0.5},
    {"name": "one", "latents": 1, "steps": 2, "mix": 0.5, "written": 0},
    {"name": "all", "steps": 2, "supervise": [[0, 1.0]], "written": 0.5},
]
TRAIN = {"tasks": {"arrows:nano": 1}, "batch": 4, "stages": STAGES, "save_every": 2, "eval_every": 6, "eval_items": 4}
VEDAS = {"name": "vedas", "num_latents": 6, "stop": "head", "replay_tokens": 3}
DEPTH = {"name": "vedas", "deepen_tokens": 5, "chunk_tokens": 2, "scale_init": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    write_folder(path, build(Shape(**SMALL), VOCABULARY, 0), "x: 1\n", {})
    return path


@pytest.fixture
def model(folder):
    return load(folder, dtype="float32")


def recipe(think=None, deepen=None, **train):
    return recipes.Recipe(name="test", think=think or VEDAS, deepen=deepen, train={**TRAIN, **train})


def lesson(run, rows=3, seed=0):
    return run.teacher.lesson(run._drawn(np.random.default_rng(seed), rows), "latent")


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


def test_what_is_trained_is_listed_by_name(model, tmp_path):
    with VedasRun(recipe(deepen=DEPTH, backbone="frozen"), model, tmp_path / "a") as run:
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        assert names == {
            f"mmroute.deepen.{n}" for i in (1, 3) for n in (f"router.{i}.weight", f"router.{i}.bias", f"scale.{i}")
        }
        assert run.learners.backbone is None
    with VedasRun(recipe(), model, tmp_path / "b"):
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        text = {n for n, _ in model.named_parameters() if n.startswith("model.language_model.")}
        assert names == text
    with VedasRun(recipe(backbone="lora", lora_rank=2), model, tmp_path / "c"):
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        assert len(names) == 4 * 7 * 2
        assert all("lora_" in n and "language_model.layers" in n for n in names)
    assert not any("lora" in n for n, _ in model.named_parameters())


@pytest.mark.parametrize("think", [VEDAS, {"name": "pause", "num_latents": 6}])
def test_a_killed_run_goes_on_with_the_same_losses_and_leaves_the_model_alone(model, tmp_path, think):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    given = recipe(think, deepen=DEPTH, recon_weight=0.1)
    train_vedas(given, model, tmp_path / "whole")
    with VedasRun(given, model, tmp_path / "killed") as run:
        run.train(stop_after=5)  # the state is that of step 4
    train_vedas(given, model, tmp_path / "killed", resume=True)
    logs = [(tmp_path / d / "log.jsonl").read_text().splitlines() for d in ("whole", "killed")]
    entries = [[{k: v for k, v in json.loads(line).items() if k != "cpu_s"} for line in log] for log in logs]
    assert entries[0] == entries[1]
    assert [e["stage"] for e in entries[0] if "stage" in e] == ["written"] * 2 + ["one"] * 2 + ["all"] * 2
    for name in ("mmroute.safetensors", "backbone.safetensors"):
        one, other = (load_file(tmp_path / d / "latent" / name) for d in ("whole", "killed"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(InputError, match="holds a run already"):
        train_vedas(given, model, tmp_path / "whole")
    with pytest.raises(ConfigError, match="another recipe"):
        train_vedas(recipe(think), model, tmp_path / "whole", resume=True)


def test_what_was_trained_answers_as_the_trainer_saw_it(model, tmp_path):
    given = recipe(deepen=DEPTH, stages=[{"name": "all", "steps": 3, "supervise": [[0, 1.0]], "muon": 0.01}])
    with VedasRun(given, model, tmp_path / "run") as run:
        run.train()
        folder = run.write({})
        task = run.tasks["arrows:nano"]
        drawn = [(task, task.spec("val", i)) for i in range(6)]
        model.eval()
        with torch.no_grad():
            replaced = [len(g) for g in run.teacher.lesson(drawn, "latent").groups]
            batch = run.teacher.lesson(drawn, "latent")
            _, H, labels = run.passes.chunks(batch, replaced, replaced, training=False)
            want = run.passes.head(H)[:, 0].argmax(-1).tolist()
    used = dataclasses.replace(given, trained=str(folder), train=None)
    with equip(model, used) as (routed, think):
        for (_, spec), steps, word in zip(drawn, replaced, want, strict=True):
            object.__setattr__(think.config, "num_latents", steps)
            object.__setattr__(think.config, "stop", "fixed")
            answer = routed.answer_many([task.messages(task.sample(spec), "latent")], max_new_tokens=1)[0]
            assert answer.ids == [word]
            assert answer.latents == steps
            assert answer.ar_steps == steps + 1
    assert (labels != IGNORED).sum(1).tolist() == [3] * 6


def test_replay_is_added_to_latents_that_an_earlier_run_taught(model, tmp_path):
    plain = {"name": "coconut", "num_latents": 6, "stop": "head"}
    folder = train_vedas(recipe(plain, DEPTH), model, tmp_path / "first")
    stock = {n: p.clone() for n, p in model.named_parameters()}
    with VedasRun(recipe(VEDAS, DEPTH, start=str(folder)), model, tmp_path / "second") as run:
        saved, moved = load_file(folder / "mmroute.safetensors"), load_file(folder / "backbone.safetensors")
        parts, now = run.routed.parts.state_dict(), dict(model.named_parameters())
        assert saved and all(torch.equal(parts[n], value) for n, value in saved.items())
        assert moved and all(torch.equal(now[n], value.float()) for n, value in moved.items())
        run.train()
        run.write({})
    assert all(torch.equal(stock[n], p) for n, p in model.named_parameters())
    for given, error, message in (
        (recipe(VEDAS, DEPTH, start=str(folder), backbone="lora"), ConfigError, "full or frozen"),
        (recipe(VEDAS, start=str(folder)), CheckpointMismatch, "deepen"),
        (recipe(VEDAS, DEPTH, start="nowhere"), ConfigError, "no routers in 'nowhere'"),
    ):
        with pytest.raises(error, match=message):
            VedasRun(given, model, tmp_path / "third")
        assert all(torch.equal(stock[n], p) for n, p in model.named_parameters())


def test_gates_end_a_stage_early_or_the_whole_run(model, tmp_path):
    easy = [
        {"name": "a", "steps": 9, "until": 0.0, "latents": 0},
        {"name": "b", "steps": 2, "until": 1.0, "on_cap": "stop"},
        {"name": "c", "steps": 5},
    ]
    with VedasRun(recipe(stages=easy, gate_every=2), model, tmp_path / "a") as run:
        progress = run.train()
    assert (progress.step, progress.finished) == (4, True)
    log = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert [e["stage"] for e in log if "stage" in e] == ["a", "a", "b", "b"]
    assert log[-1] == {"step": 4, "stopped": "b"}


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"think": {"name": "text"}}, r"training latents needs think\.name coconut, ivtlr, vedas or pause"),
        ({"tasks": {"nowhere": 1}}, "no task named 'nowhere'"),
        ({"latent_grad": "half"}, r"latent_grad: .*pattern"),
        ({"stages": [{"name": "x"}]}, "stage x: give either steps or epochs"),
        ({"stages": [{"name": "x", "epochs": 2}]}, "epoch_items with the latter"),
    ],
)
def test_a_recipe_that_cannot_be_trained_says_why(model, tmp_path, changes, message):
    think = changes.pop("think", None)
    with pytest.raises(ConfigError, match=message):
        VedasRun(recipe(think, **changes), model, tmp_path / "x")


def test_fewer_latents_than_states_is_refused_with_the_number_needed(model, tmp_path):
    message = r"num_latents allows 1 latents of 1 each; raise it to \d"
    short = VedasRun(recipe({**VEDAS, "num_latents": 1}), model, tmp_path / "a")
    with short as run, pytest.raises(ConfigError, match=message):
        run.passes.work(lesson(run), "all")
    with VedasRun(recipe({**VEDAS, "num_latents": 1}, groups=1), model, tmp_path / "b") as run:
        assert run.passes.work(lesson(run), "all").answer.isfinite()


def test_readouts_read_the_words_in_front_of_a_groups_last(model, tmp_path):
    coconut = {"name": "coconut", "num_latents": 6, "stop": "head"}
    pairs = {"steps_per_group": 2, "readout_weight": 0.5}
    with VedasRun(recipe(coconut, **pairs), model, tmp_path / "a") as run:
        batch = lesson(run)
        rollout, *_ = run.passes.chunks(batch, [len(g) for g in batch.groups], [len(g) for g in batch.groups], False)
        maps, losses = run.helpers.readout.maps, []
        assert torch.equal(maps[0], torch.eye(len(maps[0])))
        maps.data += torch.randn(maps.shape, generator=torch.Generator().manual_seed(0))
        out = run.passes.work(batch, "all")
        for b, groups in enumerate(batch.groups):
            for t, group in enumerate(groups):
                for j, word in enumerate(group[-2::-1]):
                    logits = run.passes.head(maps[j] @ rollout.fed[t][b].float())
                    losses.append(F.cross_entropy(logits[None], torch.tensor([word])))
        assert losses
        assert out.readout.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
        assert run.loss(out, 2.0).item() == pytest.approx((out.answer + 2 * (out.supervised + out.readout / 2)).item())
        before = maps.detach().clone()
        run.loss(out, 1.0).backward()
        run.learners.step(1.0, run.stage)
        assert not torch.equal(maps[0], before[0])


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


def test_long_chains_are_drawn_more_often_where_asked(model, tmp_path):
    means = []
    for power in (0.0, 3.0):
        with VedasRun(recipe(length_power=power), model, tmp_path / f"{power}") as run:
            drawn = [run._drawn(np.random.default_rng(i), 1)[0] for i in range(60)]
            means.append(np.mean([len(task.chain(spec)) for task, spec in drawn]))
    assert means[1] > means[0] + 0.3


def test_epochs_are_counted_in_items(model, tmp_path):
    with VedasRun(recipe(stages=[{"name": "x", "epochs": 1.5}], epoch_items=10), model, tmp_path / "a") as run:
        assert run.lengths == [4]  # 15 items of 4


@pytest.mark.parametrize("name", ["latent", "latent-depth", "vedas", "coconut", "ivtlr", "pause"])
def test_a_shipped_training_recipe_trains_what_the_run_recipe_runs(name):
    trains, runs = read_recipe(name), recipes.read(name)
    assert (trains.think, trains.deepen, trains.prune) == (runs.think, runs.deepen, runs.prune)
    assert runs.trained == name
    assert trains.name == name
    assert read_recipe(name, ["train.tasks={maze: 1}"]).train["tasks"] == {"maze": 1}
    assert read_recipe(name, ["train.stages.0.steps=7"]).train["stages"][0]["steps"] == 7


@pytest.mark.parametrize(
    ("name", "against", "changed"),
    [
        ("sft-direct", "latent", {"think", "latents_per_group", "stages"}),
        ("sft-cot", "latent", {"think", "stages"}),
        ("random-depth", "latent-depth", {"deepen"}),
        ("random-patches", "vedas", {"think"}),
    ],
)
def test_a_control_differs_in_what_it_controls_and_takes_as_many_steps(name, against, changed):
    control, real = (dataclasses.asdict(read_recipe(each)) for each in (name, against))
    ours, theirs = ({**each, **each.pop("train"), "name": "", "train": None} for each in (control, real))
    assert {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)} == changed
    assert sum(s["steps"] for s in ours["stages"]) == sum(s["steps"] for s in theirs["stages"])


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


def test_the_trained_way_to_think_comes_back_with_the_parts(model, tmp_path, caplog):
    think = {"name": "pause", "num_latents": 5, "stop": "head"}
    given = recipe(think, stages=[{"name": "all", "steps": 1}])
    folder = train_vedas(given, model, tmp_path / "run")
    placeholders = load_file(folder / "mmroute.safetensors")["think.placeholders"]
    with tuned(model, folder), from_pretrained(folder, base=model) as routed:
        assert routed.think.config.num_latents == 5
        assert torch.equal(routed.think.learned.placeholders, placeholders)
        task = load_task("arrows:nano")
        answer = routed.answer_many([task.messages(task.sample(task.spec("val", 0)), "latent")])[0]
        assert answer.latents >= 1
    text = dataclasses.replace(given, think={"name": "text"}, trained=str(folder))
    with equip(model, text) as (routed, other):
        assert other.style == "cot", "the same weights, another way to think"
        assert routed.parts.think is None
    longer = dataclasses.replace(given, think={"name": "coconut", "num_latents": 7}, trained=str(folder))
    with pytest.raises(CheckpointMismatch, match=r"think\.scale"), equip(model, longer):
        pass
    coconut = train_vedas(recipe({"name": "coconut", "num_latents": 6}, stages=[{"name": "all", "steps": 1}]), model,
                          tmp_path / "other")  # fmt: skip
    fewer = dataclasses.replace(given, think={"name": "coconut", "num_latents": 2}, trained=str(coconut))
    with caplog.at_level("WARNING"), equip(model, fewer):
        assert "was trained with 6 latent steps, this run takes 2" in caplog.text
