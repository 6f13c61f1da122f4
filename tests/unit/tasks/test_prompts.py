"""Wordings for general models: the same question in other words and orders, and templates from files."""

import dataclasses

import pytest
from worlds import WORLDS

from mmroute import hub
from mmroute.errors import ConfigError
from mmroute.tasks import _prompts
from mmroute.tasks._mvot_rows import rows
from mmroute.tasks._prompts import Question

QUESTION = Question("A maze.", "Walls block.", "Moves: up.", "Where?", ("A. here", "B. there"), "Give a letter.")


def blocks(task, spec, style="sentence"):
    (message,) = task.messages(task.sample(spec), style)
    return [b.get("text", "<image>") for b in message["content"]]


def test_plain_keeps_the_order_of_its_parts_and_options_stand_in_lines():
    assert QUESTION.plain() == "A maze. Walls block. Moves: up. Where?\nA. here\nB. there\nGive a letter."
    yes_no = dataclasses.replace(QUESTION, scene="", rules="", given="", options=(), instruction="Yes or no.")
    assert yes_no.plain() == "Where? Yes or no."


def test_paraphrases_are_five_different_texts_with_the_same_facts():
    texts = [QUESTION.reworded(i) for i in range(_prompts.NUM_PARAPHRASES)]
    assert texts[0] == QUESTION.plain()
    assert len(set(texts)) == 5
    for text in texts:
        assert all(
            part in text for part in ("A maze.", "Walls block.", "Moves: up.", "Where?", "\nA. here\nB. there\n")
        )


@pytest.mark.parametrize("name", WORLDS)
def test_para_depends_on_the_item_alone_and_takes_all_wordings(name):
    task = hub.load("tasks", name)
    made: dict = {}
    for i in range(160):
        spec = task.spec("val", i)
        made.setdefault(spec.seed % 5, spec)
        if len(made) == 5:
            break
    assert set(made) == set(range(5))
    for spec in made.values():
        assert blocks(task, spec, "para") == ["<image>", task.ask(spec).reworded(spec.seed % 5)]
        assert blocks(hub.load("tasks", name, prompt="para"), spec) == blocks(task, spec, "para")


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("style", ["sentence", "para"])
def test_question_first_puts_the_picture_behind_plain_english_too(name, style):
    spec = hub.load("tasks", name).spec("val", 1)
    first, last = (
        blocks(hub.load("tasks", name, prompt_order=o), spec, style) for o in ("image_first", "question_first")
    )
    assert first[0] == last[-1] == "<image>"
    assert first[1:] == last[:-1]


@pytest.mark.parametrize("name", ["maze", "frozenlake"])
def test_mvot_like_is_the_source_of_the_first_row(name):
    task = hub.load("tasks", name, preset="mvot", hop_images="observed", hop_text="action")
    spec = task.spec("val", 0)
    told = blocks(task, spec, "mvot-like")
    assert "".join(told) == rows(task.sample(spec))[0].source
    assert told[1] == "<image>"
    assert told[0].index("Moves:") < told[0].index("Action sequence: Go ") < told[0].index("Initial")
    assert told[2] == "\nResponse: "


def test_a_world_without_moves_has_no_mvot_like_wording():
    task = hub.load("tasks", "arrows")
    with pytest.raises(ConfigError, match="arrows has no mvot-like wording; only maze, frozenlake"):
        blocks(task, task.spec("val", 0), "mvot-like")


def test_a_template_file_takes_parts_by_name_and_leaves_other_braces_alone(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("{scene} {x}\n{image}{given}\n{options}\n{question}")
    task = hub.load("tasks", "maze", prompt=str(file))
    spec = task.spec("val", 0)
    ask = task.ask(spec)
    lines = "\n".join(ask.options)
    assert blocks(task, spec) == [f"{ask.scene} {{x}}\n", "<image>", f"{ask.given}\n{lines}\n{ask.plain()}"]


@pytest.mark.parametrize(
    ("text", "told"), [(None, "No such file"), ("no picture", "exactly once"), ("{image}{image}", "once")]
)
def test_a_template_that_cannot_be_used_says_why(tmp_path, text, told):
    file = tmp_path / "p.txt"
    if text is not None:
        file.write_text(text)
    task = hub.load("tasks", "maze", prompt=str(file))
    with pytest.raises(ConfigError, match=told):
        blocks(task, task.spec("val", 0))


def test_an_unknown_style_is_named_with_the_known_ones():
    task = hub.load("tasks", "maze")
    with pytest.raises(ConfigError, match="cot, direct, latent, image, probe, sentence, para, mvot-like"):
        blocks(task, task.spec("val", 0), "poem")
