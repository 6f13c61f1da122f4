"""Rationales cut into groups: sizes, borders, and which words of a chain name a state."""

import pytest

from mmroute import hub
from mmroute.train.steps import merged, split_text, outcomes


@pytest.mark.parametrize(("steps", "most"), [(1, 3), (3, 3), (4, 3), (5, 3), (11, 4), (2, 1)])
def test_groups_differ_by_one_step_at_most_and_earlier_ones_are_larger(steps, most):
    given = [[i, -i] for i in range(1, steps + 1)]
    groups = merged(given, most)
    sizes = [len(g) // 2 for g in groups]
    assert [x for g in groups for x in g] == [x for step in given for x in step]
    assert len(groups) == min(steps, most)
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_text_is_cut_where_asked():
    text = "It is red. It is hot, e.g. fire.\n\nSo 3.5 burns! 4 remain"
    assert split_text([text], "given") == [text]
    assert split_text([text], "blank_line") == ["It is red. It is hot, e.g. fire.", "So 3.5 burns! 4 remain"]
    assert split_text([text], "sentence") == ["It is red.", "It is hot, e.g. fire.", "So 3.5 burns!", "4 remain"]
    assert split_text([" ", ""], "sentence") == []


@pytest.mark.parametrize("name", ["arrows", "frozenlake", "maze", "gridspatial"])
def test_states_are_words_of_the_chain_that_the_question_does_not_give(name):
    task = hub.load("tasks", name)
    for i in range(20):
        spec = task.spec("val", i)
        chain, states = task.chain(spec), outcomes(task.chain(spec))
        assert all(len(group) == 1 for group in states)
        words = [w for step in chain for w in step]
        assert [w for w in words if [w] in states] == [g[0] for g in states]
        if name == "arrows":
            cells = [task.at(spec, state.cell) for state in task.trace(spec)]
            assert [g[0] for g in states] == cells, "one state for the start and one for each step"
