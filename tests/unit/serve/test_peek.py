"""The rating at the head of a stream: whatever the chunking, what the client sees is the model's text without it."""

import copy
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmroute.serve.peek import Peek, Rated, expected

TEXTS = st.text(st.sampled_from("0129 \n.abé"), max_size=30)


def chunked(text, cuts, name="content"):
    edges = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)] or [""]
    deltas = [{"role": "assistant", "content": ""}, *({name: p} for p in pieces), {}]
    chunks = [{"choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
    chunks[-1]["choices"][0]["finish_reason"] = "stop"
    return chunks


def through(chunks, num_ratings=2):
    """State, and the text a client would see."""
    peek, rest = Peek(num_ratings), [copy.deepcopy(c) for c in chunks]
    while peek.state == "open" and rest:
        peek.feed(rest.pop(0))
    seen = [*peek.held(), *rest]
    text = "".join(c["choices"][0]["delta"].get(n) or "" for c in seen for n in ("content", "reasoning_content"))
    return peek, text, seen


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 40), max_size=6), st.sampled_from(["content", "reasoning_content"]))
def test_a_rated_answer_is_the_text_behind_the_rating(answer, cuts, name):
    peek, text, seen = through(chunked("73\n" + answer, cuts, name))
    assert peek.state == "rated"
    assert peek.rated == Rated(7 / 9, 3 / 9)
    assert text == answer
    assert any(c["choices"][0].get("finish_reason") for c in seen)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 40), max_size=3))
def test_blanks_that_a_tokenizer_of_words_sets_go_with_the_rating(answer, cuts):
    peek, text, _ = through(chunked("7 3 \n " + answer, cuts))
    assert peek.state == "rated"
    assert peek.rated == Rated(7 / 9, 3 / 9)
    assert text == answer
    assert peek.tokens == 3
    one, text, _ = through(chunked("7 \n" + answer.lstrip(" "), cuts), 1)
    assert (one.state, text) == ("rated", answer.lstrip(" "))


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 40), max_size=6), st.sampled_from([1, 2]))
def test_a_head_that_is_no_rating_loses_only_what_began_like_one(answer, cuts, n):
    peek, text, _ = through(chunked(answer, cuts), n)
    head = answer[:1] if answer[:1].isspace() else ""
    body = answer[len(head) :]
    is_rating = re.match("[0-9]( ?)" + "[0-9]\\1" * (n - 1) + "\n", body) is not None
    assert (peek.state == "rated") == is_rating
    assert answer.endswith(text)
    assert len(answer) - len(text) <= 2 * n + 3  # a blank in front, digits and their blanks, newline and the next blank


def test_nothing_is_given_away_before_it_is_certain():
    peek = Peek(2)
    assert peek.feed({"choices": [{"delta": {"content": "7"}}]}) == "open"
    assert peek.feed({"choices": [{"delta": {"content": "3"}}]}) == "open"
    assert peek.feed({"choices": [{"delta": {"content": "\nSo"}}]}) == "rated"
    assert [c["choices"][0]["delta"]["content"] for c in peek.held()] == ["So"]


def test_eight_chunks_without_a_rating_are_enough():
    peek = Peek(2)
    states = [peek.feed({"choices": [{"delta": {"role": "assistant"}}]}) for _ in range(8)]
    assert states == ["open"] * 7 + ["unrated"]


@pytest.mark.parametrize(
    ("entries", "value"),
    [
        ([("8", -0.2231), ("9", -1.6094)], (8 * 0.8 + 9 * 0.2) / 9),
        ([("8", -0.6931), ("x", -0.6932)], 8 / 9),  # half the mass on digits, or a little more: renormalised
        ([("8", -2.0), ("9", -2.0), ("the", -0.3)], 8 / 9),  # mostly something else: the digit alone
        ([(" 8", -0.6931), ("8", -0.6931)], 8 / 9),
        ([], 8 / 9),
    ],
)
def test_a_rating_is_an_expectation_where_the_levels_hold_the_mass(entries, value):
    entry = {"top_logprobs": [{"token": t, "logprob": p} for t, p in entries]}
    assert expected("8", entry) == pytest.approx(value, abs=1e-4)


def test_with_one_rating_the_score_is_the_drafts_doubt_and_with_two_the_targets_advantage():
    assert Rated(0.3).score == pytest.approx(0.7)
    assert Rated(0.3, 0.9).score == pytest.approx(0.6)
