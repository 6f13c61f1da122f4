"""Truth tables of the parsers and scoring rules; no string makes one raise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmroute.errors import ConfigError
from mmroute.tasks import _parse
from mmroute.tasks._parse import Reply, judge
from mmroute.tasks.base import Choice

COLOURS = [Choice("red"), Choice("blue"), Choice("light blue")]
LETTERS = [Choice("A"), Choice("B"), Choice("C"), Choice("D")]
CUBES = [Choice("A", "red"), Choice("B", "red cube"), Choice("C")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is B.", "B"),
        ("answer: B", "B"),
        ("Answer: (c)", "C"),
        ("**Answer:** D", "D"),
        ("The answer is **B**, since A is a wall.", "B"),
        ("the correct answer is option C", "C"),
        (r"The final answer is: $\boxed{D}$", "D"),
        ("The answer is A. No wait. The answer is C.", "C"),
        ("Go right, then down, so it must be B.", "B"),
        ("B", "B"),
        (" (b) ", "B"),
        ("b.", "B"),
        ("B. The red plate.", "B"),
        ("B) the red one", "B"),
        ("B\nbecause it is red", "B"),
        ("The answer is a", "A"),
        # Unsure is None, never a guess.
        ("The answer is a dog.", None),
        ("The answer is E.", None),
        ("The answer is E, not A", None),
        ("answer: B or C", None),
        ("A or B?", None),
        ("A, B and C are walls, as is the dog", None),
        ("There is a wall in front of a", None),
        ("It is certainly not B", None),
        ("A dog stands at the wall", None),
        ("The agent passes A, then B, and stops early", None),
        ("Banswer: ", None),
        ("answer:", None),
        ("", None),
    ],
)
def test_strict_reads_letters(text, expected):
    assert _parse.letter(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("answer: light blue", "light blue"),
        ("The answer is the blue one.", "blue"),
        ("Blue", "blue"),
        ("answer: blueish", None),
        ("I see red and blue.", None),
        ("answer: purple", None),
    ],
)
def test_strict_reads_words(text, expected):
    assert _parse.strict(text, COLOURS) == expected


def test_strict_reads_a_choice_by_its_text():
    fates = [Choice("A", "success"), Choice("B", "hole_fall")]
    assert _parse.strict("s1 up r0c1 hole answer: hole_fall", fates) == "B"
    assert _parse.strict("answer: hole", fates) is None


def test_a_label_wins_over_another_choices_text():
    assert _parse.strict("answer: B", [Choice("A", "B"), Choice("B", "A")]) == "B"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("No.", "no"),
        ("Yes, it is left of the cube.", "yes"),
        ("The answer is no.", "no"),
        ("No dogs are visible", None),
        ("Yes, but also no.", None),
        ("nothing", None),
    ],
)
def test_yes_no_takes_a_plain_answer_only(text, expected):
    assert _parse.yes_no(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{3}", "3"),
        (r"first \boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{", None),
        (r"\boxed{}", None),
        ("3", None),
    ],
)
def test_boxed_takes_the_last_balanced_box(text, expected):
    assert _parse.boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12", 12.0),
        ("It costs 1,200 dollars.", 1200.0),
        ("2 and 3 make 5, the answer is 5.", 5.0),
        ("answer: -0.5 m", -0.5),
        (r"5 steps: \boxed{1e3}", 1000.0),
        ("3/4", 0.75),
        ("3/0", None),
        ("2 and 3", None),
        ("r2c1", None),
        ("none", None),
    ],
)
def test_number_is_read_where_it_is_the_only_candidate(text, expected):
    assert _parse.number(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Red Cube.", "red cube"),
        ("I look closely at it. The answer is a T-shirt.\nDone", "t shirt"),
        ("two\nlines", None),
        ("this is a long sentence that says nothing short", None),
        ("...", None),
    ],
)
def test_short_answer_is_normalised(text, expected):
    assert _parse.short_answer(text) == expected


@pytest.mark.parametrize(
    ("scorer", "reply", "expected"),
    [
        ("strict", Reply("The answer is B.", "B", LETTERS), (True, "B")),
        ("strict", Reply("The answer is B.", "C", LETTERS), (False, "B")),
        ("strict", Reply("no idea", "C", LETTERS), (False, None)),
        ("mvot", Reply("Action sequence finished. The answer is B.", "B", LETTERS), (True, "B")),
        ("mvot", Reply("answer: B", "B", LETTERS), (False, None)),
        ("mvot", Reply("Go right.", "", LETTERS), (None, None)),
        ("vedas_lenient", Reply("The answer is a dog", "A", LETTERS), (True, "a")),
        ("vedas_lenient", Reply("The answer is C. The answer is B.", "C", LETTERS), (True, "B")),
        ("vedas_lenient", Reply("The answer is C", "A", LETTERS), (False, "C")),
        ("vedas_lenient", Reply("nothing", "", LETTERS), (False, None)),
        ("m3cot_official", Reply("(A) is wrong, so (C)", "C", LETTERS), (True, "C")),
        ("m3cot_official", Reply("the red cube", "B", CUBES), (True, "B")),
        ("m3cot_official", Reply("it is C", "C", CUBES), (True, "C")),
        ("m3cot_official", Reply("unclear", "C", LETTERS), (False, None)),
    ],
)
def test_named_scorers_follow_their_rule(scorer, reply, expected):
    assert judge(scorer, reply) == expected


def test_only_the_lenient_rule_counts_answers_in_the_prompt():
    reply = Reply("I cannot say", "B", LETTERS, prompt="Example. The answer is B.")
    assert {name: judge(name, reply).correct for name in _parse.SCORERS} == {
        "strict": False,
        "mvot": False,
        "vedas_lenient": True,
        "m3cot_official": False,
    }


def test_an_unknown_scorer_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match="no scorer named 'loose'; one of strict, mvot"):
        judge("loose", Reply("B", "B", LETTERS))


_TEXTS = st.one_of(st.text(), st.text(alphabet="answer is:ABCD(){}\\boxed 0123/.,-\n"))


@given(_TEXTS, st.sampled_from(["A", "B", "", "yes", "É"]))
def test_no_text_makes_a_parser_raise(text, gold):
    for parser in (_parse.letter, _parse.yes_no, _parse.short_answer, _parse.boxed, _parse.number, _parse.normalise):
        parser(text)
    for name in _parse.SCORERS:
        verdict = judge(name, Reply(text, gold, [Choice("A", text), Choice("B")], text))
        assert not (verdict.correct and verdict.prediction is None)


@given(_TEXTS)
def test_what_strict_reads_is_a_label(text):
    assert _parse.strict(text, COLOURS) in {"red", "blue", "light blue", None}


@given(st.text(alphabet="goright, \n"), st.sampled_from("ABCD"))
def test_a_closing_answer_phrase_is_always_read(chain, label):
    assert _parse.letter(f"{chain}\nThe answer is {label}.") == label
