"""The tiles said to be relevant suffice and are needed; what fog hides cannot be known."""

import dataclasses

import numpy as np
import pytest
from worlds import ON_GROUND, SEARCHED, WORLDS, specs

from mmroute import hub
from mmroute.errors import InputError
from mmroute.tasks import _skins
from mmroute.tasks._solver import solve
from mmroute.tasks.base import relevant_tokens


@pytest.mark.parametrize("name", WORLDS)
def test_the_relevant_tiles_suffice_and_each_kind_of_them_is_needed(name: str) -> None:
    task = hub.load("tasks", name)
    broken = 0
    for spec in specs(task, "test", 40):
        codes, question, word = task.codes(spec), task.question_words(spec), task._answer_word(spec)
        hops = range(len(task.trace(spec)) + 1)
        needed = sorted({tile for hop in hops for tile in task.relevant(spec, hop)})
        assert set(needed) <= set(task.board(spec))
        fogged = np.full_like(codes, _skins.FOG)
        fogged.reshape(-1)[needed] = codes.reshape(-1)[needed]
        assert solve(name, question, fogged) == word
        for tile in needed:
            fogged = codes.copy()
            fogged.reshape(-1)[tile] = _skins.FOG
            broken += solve(name, question, fogged) != word
    assert broken >= 40


@pytest.mark.parametrize("name", ON_GROUND)
def test_relevant_tokens_follow_the_tiles_to_other_patch_grids(name: str) -> None:
    task = hub.load("tasks", name)
    spec = task.spec("test", 2)
    sample = task.sample(spec)
    same = relevant_tokens(sample, (1, 20, 20), 2)
    assert np.flatnonzero(same.board).tolist() == sorted(task.board(spec))
    assert same.hops[1] == task.relevant(spec, 1)
    assert same.needed.sum() < same.board.sum() < 100
    finer = relevant_tokens(sample, (1, 40, 40), 2)
    assert finer.needed.sum() == 4 * same.needed.sum()
    coarser = relevant_tokens(sample, (1, 10, 10), 2)  # 25 tokens, each of four tiles
    blocks = {(t // 10 // 2) * 5 + t % 10 // 2 for t in np.flatnonzero(same.needed).tolist()}
    assert set(np.flatnonzero(coarser.needed).tolist()) == blocks


def test_a_sample_without_tiles_has_no_relevant_tokens() -> None:
    sample = hub.load("tasks", "maze").sample(hub.load("tasks", "maze").spec("val", 0))
    with pytest.raises(InputError, match="tiles skin"):
        relevant_tokens(dataclasses.replace(sample, meta={"canvas": []}), (1, 20, 20), 2)


@pytest.mark.parametrize("name", SEARCHED)
def test_fogged_items_cannot_be_solved_from_what_is_visible(name: str) -> None:
    task = hub.load("tasks", name, solvable="none")
    made = specs(task, "test", 240)
    assert all(solve(name, task.question_words(s), task.codes(s)) is None for s in made)
    assert not any(s.fog for s in specs(task, "train", 20))
    # what stays visible is shared by items with different answers, so the labels must be even
    for num in {len(task.choices(s)) for s in made}:
        counts = np.bincount([s.answer for s in made if len(task.choices(s)) == num], minlength=num)
        assert (np.abs(counts - counts.sum() / num) <= 4 * np.sqrt(counts.sum() / num)).all()
    assert {task.sample(s).difficulty["solvable"] for s in made[:3]} == {False}


def test_the_gate_mix_holds_other_sizes_and_fogged_items() -> None:
    made = specs(hub.load("tasks", "maze", preset="gate-mix"), "test", 480)
    fogged = np.mean([bool(s.fog) for s in made])
    large = np.mean([s.n > 6 for s in made])
    assert 0.02 < fogged < 0.16
    assert 0.02 < large < 0.2
