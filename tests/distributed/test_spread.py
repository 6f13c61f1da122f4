"""`mmroute eval` on two ranks and on a Ray cluster answers what one process answers, each item once."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from ranks import launch

from mmroute.backbones.load import load
from mmroute.bench import run, spread
from mmroute.errors import InputError
from mmroute.recipe import read

ASKED = ["--task", "frozenlake", "--recipe", "fastv", "--n", "7", "--batch", "2", "--rounds", "1", "--json"]
TIMES = ("prefill_s", "decode_s_per_token")


def _run(processes: int) -> dict:
    printed = [x for x in launch("mmroute_main.py", "eval", *ASKED, processes=processes).splitlines() if x[:1] == "{"]
    assert len(printed) == 1, "one rank speaks"
    return {key: value for key, value in json.loads(printed[0]).items() if key not in TIMES}


@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds():
    assert _run(2) == _run(1)


def on_cluster(test):
    """Ray warns of its own parts and leaves sockets open; neither is ours."""
    return pytest.mark.ray(pytest.mark.filterwarnings("ignore")(test))


PLAN = run.Plan(task="frozenlake", n=12, batch=2)
RECIPE = read("fastv")


@pytest.fixture(scope="module")
def alone():
    task = run.load_task("frozenlake")
    return run.answer_items(load("tiny"), RECIPE, task, run.draw(task, PLAN), 2)


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    os.environ["RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS"] = "0"
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ray.init(
        num_cpus=3, num_gpus=2, log_to_driver=False, include_dashboard=False, runtime_env={"env_vars": environment}
    )
    yield ray
    ray.shutdown()


@on_cluster
def test_actors_find_what_one_process_finds(cluster, alone, tmp_path):
    found = spread.on_ray("tiny", RECIPE, PLAN, tmp_path / "parts.jsonl", actors=2)
    assert found.answers == alone.answers
    assert found.scores == alone.scores


@on_cluster
def test_actors_that_ask_for_a_card_each_are_given_one_and_answer(cluster, alone):
    # Ray counts the cards it was told of; none is there, so the actors compute on the CPU.
    needs = spread.actor_needs(2, "cuda", cluster.cluster_resources())
    job = spread._Job("tiny", RECIPE, PLAN, device="cpu", dtype="")
    rows = [json.loads(line) for line in spread._answered(range(12), job, 2, needs)]
    found = spread._joined(RECIPE, alone.samples, {row["index"]: row for row in rows})
    assert found.answers == alone.answers


def _holders() -> list[int]:
    """Processes of actors that hold the model; Ray names them in their command lines."""
    lines = {int(path.parent.name): path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")}
    return [pid for pid, line in lines.items() if line.startswith(b"ray::") and b"MapWorker" in line]


@on_cluster
def test_an_actor_killed_in_the_middle_loses_and_doubles_nothing(cluster, alone, tmp_path):
    file, killed = tmp_path / "parts.jsonl", []

    def told(name: str, done: int, total: int) -> None:
        if not killed:
            killed.append(_holders()[0])
            os.kill(killed[0], 9)
            time.sleep(0.5)

    found = spread.on_ray("tiny", RECIPE, PLAN, file, actors=2, progress=told)
    assert killed
    assert found.answers == alone.answers
    rows = [json.loads(line)["index"] for line in file.read_text().splitlines()[1:]]
    assert sorted(rows) == list(range(12))


@on_cluster
def test_a_run_started_again_asks_only_for_the_rest(cluster, alone, tmp_path):
    file = tmp_path / "parts.jsonl"
    with spread.Parts(file, RECIPE, PLAN, "tiny") as parts:
        for line in spread._lines(range(12), alone)[:9]:
            parts.add(line)
    seen: list[int] = []
    found = spread.on_ray("tiny", RECIPE, PLAN, file, actors=1, progress=lambda name, done, total: seen.append(done))
    assert seen == [10, 11, 12]
    assert found.answers == alone.answers


@on_cluster
def test_more_actors_than_cpus_are_refused(cluster, tmp_path):
    with pytest.raises(InputError, match="2 actors fit"):
        spread.on_ray("tiny", RECIPE, PLAN, tmp_path / "parts.jsonl", actors=3)
