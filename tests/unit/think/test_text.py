"""Where a written thought ends: at the name of a step, at a line break, or where an option says."""

import pytest

from mmroute.errors import ConfigError
from mmroute.think.text import Text


@pytest.mark.parametrize("piece", ["s1", " s12", "\n", ".\n", "\n\n", "answer:", " answer:"])
def test_a_step_a_line_or_the_answer_begins_a_hop(piece):
    assert Text().starts_hop(piece)


@pytest.mark.parametrize("piece", ["s", "s1x", "xs1", "is", "1", "answer", " ", "", "Answer: s1"])
def test_other_words_do_not(piece):
    assert not Text().starts_hop(piece)


def test_the_pattern_is_an_option():
    think = Text(hop_pattern=r"[.!?]")
    assert think.starts_hop("end.")
    assert not think.starts_hop("s1")


def test_a_pattern_that_is_none_is_refused_when_it_is_given_and_not_in_the_middle_of_an_answer():
    with pytest.raises(ConfigError, match=r"think\.text\.hop_pattern: not a regular expression"):
        Text(hop_pattern="(")
