"""Rationales cut into groups: sizes and borders."""

import pytest

from mmroute.train.steps import merged, split_text


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
