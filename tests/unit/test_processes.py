"""Which process this is and what it computes on: decided by names and counts alone, so no card is needed to test it."""

import sys

import pytest
import torch
from PIL import Image

from mmroute import cli
from mmroute.cli._model import open_model
from mmroute.errors import ConfigError
from mmroute.processes import choose_device, device_named, num_processes, refuse_company


@pytest.mark.parametrize(
    ("name", "process", "cards", "chosen"),
    [
        ("cpu", 0, 8, "cpu"),
        ("cpu", 5, 0, "cpu"),
        ("cuda", 0, 1, "cuda:0"),
        ("cuda", 7, 8, "cuda:7"),
        ("auto", 0, 0, "cpu"),
        ("auto", 3, 0, "cpu"),
        ("auto", 3, 8, "cuda:3"),
    ],
)
def test_each_process_of_a_machine_takes_its_own_card(name, process, cards, chosen):
    assert choose_device(name, process, cards) == chosen


@pytest.mark.parametrize(
    ("name", "process", "cards", "said"),
    [
        ("cuda", 0, 0, "torch finds no CUDA device on this machine; use cpu, or auto"),
        ("cuda", 8, 8, "process 8 of this machine has no CUDA device of its own, there are 8; start at most 8"),
        ("auto", 2, 1, "process 2 of this machine has no CUDA device of its own, there are 1; start at most 1"),
        ("gpu", 0, 8, r"--device is one of cpu, cuda, auto \(given 'gpu'\)"),
    ],
)
def test_what_cannot_be_had_is_refused_with_what_can(name, process, cards, said):
    with pytest.raises(ConfigError, match=said):
        choose_device(name, process, cards)


def test_the_number_of_a_process_is_what_its_launcher_says_or_what_is_given(monkeypatch):
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert device_named("cuda") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_named("auto") == torch.device("cuda:3")
    assert device_named("cuda", 1) == torch.device("cuda:1")
    assert device_named("cpu") == torch.device("cpu")
    assert [device.index for device in taken] == [0, 3, 1]


def test_one_process_is_no_company_and_two_are(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert num_processes() == 1
    refuse_company("x", "y")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"`x` is one process, and 2 were started \(WORLD_SIZE=2\).*; y"):
        refuse_company("x", "y")


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    """`mmroute` with arguments: exit code and stderr."""
    monkeypatch.setattr(sys, "argv", ["mmroute", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("trainer", ["backbone", "dare", "prp"])
def test_trainers_that_know_one_process_refuse_several_and_write_nothing(monkeypatch, capsys, tmp_path, trainer):
    monkeypatch.setenv("WORLD_SIZE", "8")
    code, said = call(monkeypatch, capsys, "train", trainer, "--out", str(tmp_path / "run"))
    assert code == 2
    assert f"`mmroute train {trainer}` is one process, and 8 were started" in said
    assert "only `mmroute train vedas` is shared" in said
    assert not (tmp_path / "run").exists()


def test_the_trainer_that_shares_its_rows_is_not_refused_for_its_company(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "8")
    code, said = call(monkeypatch, capsys, "train", "vedas", "--recipe", "no-such-recipe")
    assert code == 2
    assert "no-such-recipe" in said
    assert "were started" not in said


def test_a_gate_is_judged_by_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, said = call(monkeypatch, capsys, "eval", "--recipe", "prp-small", "--n", "1")
    assert code == 2
    assert "`mmroute eval --recipe prp-small` is one process, and 2 were started" in said


ASKED = {
    "ask": ["Which exit?", "-i", "maze.png"],
    "eval": ["--task", "maze", "--n", "1"],
    "bench": ["--recipe", "bench-spatial", "--dry"],
    "calibrate cliff": ["--task", "maze", "--n", "1"],
    "calibrate schedule": ["--task", "maze", "--n", "1", "--budget", "0.5"],
    "diagnose interventions": ["--n", "1"],
    "diagnose latents": ["--n", "1"],
    "diagnose gradients": ["--n", "1"],
    "diagnose nuclear": ["--n", "1"],
    "diagnose router": ["--n", "1"],
    "diagnose crops": ["--n", "1"],
    "train backbone": [],
    "train vedas": [],
    "train dare": [],
    "train prp": [],
}


@pytest.mark.parametrize("verb", sorted(ASKED))
def test_every_verb_that_opens_a_model_says_that_there_is_no_card(monkeypatch, capsys, tmp_path, verb):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (28, 28)).save("maze.png")
    code, said = call(monkeypatch, capsys, *verb.split(), *ASKED[verb], "--device", "cuda")
    assert (code, "torch finds no CUDA device on this machine" in said) == (2, True), said


def test_answers_are_computed_in_the_dtype_that_was_asked_for(monkeypatch, capsys):
    assert open_model("tiny", "cpu", "bfloat16").dtype == torch.bfloat16
    assert open_model("tiny", "cpu").dtype == torch.float32
    code, said = call(monkeypatch, capsys, "eval", "--task", "maze", "--n", "1", "--dtype", "int8")
    assert code == 2
    assert "dtype: one of float32, bfloat16, float16 (given 'int8')" in said
