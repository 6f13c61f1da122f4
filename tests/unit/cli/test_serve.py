"""`mmroute serve` and `mmroute replay`: what is wrong is said in one line, before a model is loaded."""

import importlib.util
import json
import sys

import pytest
import torch

from mmroute import cli
from mmroute.serve import run as serving


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mmroute", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


@pytest.fixture
def started(monkeypatch):
    """Settings that `serve` would have run with."""
    got = []
    monkeypatch.setattr(serving, "serve", lambda settings, reread, watched: got.append((settings, reread(), watched)))
    return got


def test_flags_settings_and_files_come_together(run, started, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("drain_s: 9\nlimits: {images: 3}\n")
    draft, target = "http://127.0.0.1:1/v1#a", "http://127.0.0.1:2/v1#b/c"
    code, out, err = run(
        "serve", "--draft", draft, "--target", target, "--budget", "0.3", "--port", "0", "--config", str(file),
        "--set", "limits.queue=1", "--set", "draft.vision=false", "--set", "policy.window=64",
    )  # fmt: skip
    assert (code, out, err) == (0, "", "")
    ((settings, again, watched),) = started
    assert settings.model_dump() == again.model_dump()
    assert (settings.draft.model, settings.draft.vision, settings.target.name) == ("a", False, "b/c")
    assert settings.policy == {"name": "budget", "budget": 0.3, "window": 64}
    assert (settings.port, settings.drain_s, settings.limits.queue) == (0, 9, 1)
    assert watched == [file]


def test_the_bundled_pair_is_said_to_be_none(run, started):
    code, _, err = run("serve")
    assert code == 0
    assert "are the same model 'tiny'" in err
    assert started[0][0].host == "127.0.0.1"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "nobody is asked for a key"),
        (["--draft", "http://x/v1"], "after a #"),
        (["--set", "prot=1"], "serve.prot"),
        (["--config", "nowhere.yaml"], "no settings file"),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_line_and_2(run, started, arguments, words):
    code, out, err = run("serve", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert not started


PLACED = ["--device", "auto", "--dtype", "bfloat16"]


def where(settings):
    return [(model.name, model.device, model.dtype) for model in (settings.draft, settings.target)]


def test_device_and_dtype_are_of_both_local_models_unless_set_says_it_of_one(run, started):
    assert run("serve", *PLACED)[0] == 0
    assert run("serve", *PLACED, "--set", "target.device=cuda:1", "--set", "target.dtype=float16")[0] == 0
    (both, again, _), (each, _, _) = started
    assert where(both) == where(again) == [("tiny-schedule", "auto", "bfloat16"), ("tiny", "auto", "bfloat16")]
    assert where(each) == [("tiny-schedule", "auto", "bfloat16"), ("tiny", "cuda:1", "float16")]


def test_device_and_dtype_leave_a_model_behind_a_url_alone(run, started, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("target: {url: http://127.0.0.1:2/v1, model: far}\n")
    assert run("serve", *PLACED, "--draft", "small-draft", "--config", str(file))[0] == 0
    assert where(started[0][0]) == [("small-draft", "auto", "bfloat16"), ("far", "cpu", None)]


def test_what_is_set_of_a_model_that_nobody_named_is_set_of_the_bundled_one(run, started, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("draft: {dtype: float16}\ntarget: {vision: false}\n")
    assert run("serve", "--config", str(file))[0] == 0
    settings = started[0][0]
    assert where(settings) == [("tiny-schedule", "cpu", "float16"), ("tiny", "cpu", None)]
    assert (settings.draft.recipe, settings.target.vision) == ("schedule", False)


FAR = ["--draft", "http://127.0.0.1:1/v1#a", "--target", "http://127.0.0.1:2/v1#b"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "gpu"], "serve.draft.device: Value error, one of cpu, cuda, cuda:N (e.g. cuda:1) and auto"),
        (["--dtype", "int8"], "serve.draft.dtype: Input should be 'float32', 'bfloat16' or 'float16' (given 'int8')"),
        ([*FAR, "--device", "cuda"], "--device and --dtype are for models of this process"),
        ([*FAR, "--set", "target.dtype=float16"], "device and dtype are for models of this process; tell the server"),
    ],
    ids=str,
)
def test_a_place_that_cannot_be_is_refused_before_anything_is_loaded(run, started, arguments, words):
    code, out, err = run("serve", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert not started


@pytest.mark.parametrize(
    ("cards", "device", "words"),
    [
        (0, "cuda", "torch finds no CUDA device on this machine; use cpu, or auto"),
        (0, "cuda:1", "torch finds no CUDA device on this machine; use cpu, or auto"),
        (2, "cuda:2", "target.device: cuda:2, but the cards of this machine are cuda:0 to cuda:1"),
    ],
)
def test_a_card_that_is_not_there_is_said_before_the_port_opens(run, monkeypatch, cards, device, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    ran = []
    monkeypatch.setattr(serving._Server, "run", lambda server: ran.append(server))
    code, out, err = run("serve", "--port", "0", "--set", f"target.device={device}")
    assert (code, out) == (2, "")
    assert words in err.splitlines()[-1]
    assert not ran


@pytest.mark.parametrize("name", ["image", "boxes", "latent"])
@pytest.mark.parametrize("role", ["draft", "target"])
def test_thoughts_that_are_not_words_alone_are_not_served(run, role, name):
    code, out, err = run("serve", f"--{role}", "small-draft", "--set", f"{role}.recipe={name}", "--port", "0")
    assert (code, out) == (2, "")
    assert f"{role}.recipe: {name} thinks in pictures, boxes or latents" in err.splitlines()[-1]
    assert "give a recipe that thinks in text" in err


def test_a_missing_extra_is_named(run, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "uvicorn" else found(name, *a))
    for name in [n for n in sys.modules if n == "mmroute.serve" or n.startswith("mmroute.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    code, _, err = run("serve")
    assert code == 1
    assert 'pip install "mmroute[serve]"' in err


def test_replay_runs_another_policy_over_a_log(run, tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [
        {"schema": "replay/1", "request_id": str(i), "outcome": "ok", "route": "target", "reason": "rating",
         "score": i / 10, "draft_rating": None, "target_rating": None, "shadow": None, "total_ms": 5}
        for i in range(10)
    ]  # fmt: skip
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, _ = run("replay", str(log), "--set", "name=threshold", "--set", "threshold=0.65", "--json")
    assert code == 0
    assert json.loads(out)["target_share_now"] == pytest.approx(0.3)
    assert "target_share_now" in run("replay", str(log), "--budget", "0.5")[1]
    assert run("replay", str(log))[0] == 2
    assert run("replay", "nowhere", "--budget", "1")[0] == 1
