"""Rationales and boxes of other people's data become hops; nothing of a foreign folder is guessed."""

import json

import benchmarks
import pytest
from benchmarks import place
from made import picture

from mmroute.errors import ConfigError, InputError
from mmroute.tasks import _import, _io
from mmroute.tasks._import import blank_line, import_samples, sentence

pytest.importorskip("pyarrow")


@pytest.mark.parametrize(
    ("text", "most", "parts"),
    [
        ("One. Two. Three. Four. Five.", 3, ["One. Two.", "Three.", "Four. Five."]),
        ("One. Two", 3, ["One.", "Two."]),
        ("At 3.5 metres it stops.", 3, ["At 3.5 metres it stops."]),
        ("", 3, []),
    ],
)
def test_rationales_are_cut_at_sentences_and_merged_evenly(text, most, parts):
    assert sentence(text, most) == parts


def test_traces_are_cut_at_blank_lines():
    assert blank_line("a\n\nb\nc\n\n\nd") == ["a", "b\nc", "d"]
    assert blank_line("\n\n".join("abcde"), 4) == ["a", "b", "c\n\nd", "e"]


@pytest.mark.parametrize(
    ("name", "hops"),
    [
        ("m3cot", [["Blue is light.", "So it floats."], []]),
        ("scienceqa", [["Mammals have fur.", "Frogs have none.", "The bear has fur."], []]),
        ("gqa", [["No, it is clear."], ["The girl is wearing a shirt."], ["The sky is clear."]]),
        ("onethinker", [["Red is small.", "Blue is large."], ["2 + 3 = 5."]]),
    ],
)
def test_a_benchmarks_rationale_is_its_hops(tmp_path, name, hops):
    place(tmp_path, name, 0)
    samples = list(import_samples(tmp_path / name, name))
    assert [[h.text for h in s.hops] for s in samples] == hops
    assert _io.write(samples, tmp_path / "out", "jsonl") == len(hops)
    again = list(_io.read(tmp_path / "out"))
    assert [s.answer for s in again] == [s.answer for s in samples]


def vocot(folder, rows):
    (folder / "images").mkdir(parents=True)
    picture(3, side=10).save(folder / "images" / "a.png")
    (folder / "data.jsonl").write_text("".join(json.dumps({"image": "a.png", **row}) + "\n" for row in rows))
    return folder


THOUGHT = (
    "The cup <coor> 0.1,0.2,0.3,0.4 </coor> is red. The dogs <coor>0,0,5,10; 5,0,10,10</coor> sit. The answer is B."
)


def test_vocots_boxes_become_box_hops_in_shares_of_the_picture(tmp_path):
    talk = [
        {"from": "human", "value": "<image>\nWhich?\nA. cup\nB. dog"},
        {"from": "gpt", "value": THOUGHT},
    ]
    columns = {"question": "What is it?", "thought": "A dog <coor> 0,0,1,1 </coor>.", "answer": "dog"}
    first, second = import_samples(vocot(tmp_path, [{"conversation": talk}, columns]), "vocot")
    assert (first.question, first.answer, [c.text for c in first.choices]) == ("Which?", "B", ["cup", "dog"])
    assert [h.text for h in first.hops] == ["The cup is red.", "The dogs sit."]
    assert [h.boxes for h in first.hops] == [[[0.1, 0.2, 0.3, 0.4]], [[0, 0, 0.5, 1.0], [0.5, 0, 1.0, 1.0]]]
    assert [h.box_image for h in first.hops] == [0, 0]
    assert (second.answer, second.choices, second.hops[0].text) == ("dog", [], "A dog.")


def test_a_broken_box_and_a_missing_picture_name_their_line(tmp_path):
    row = {"question": "q", "thought": "x <coor> 1,2 </coor>", "answer": "a"}
    with pytest.raises(InputError, match=r"data.jsonl:1: .*four numbers"):
        list(import_samples(vocot(tmp_path / "a", [row]), "vocot"))
    folder = vocot(tmp_path / "b", [row])
    (folder / "images" / "a.png").unlink()
    with pytest.raises(InputError, match=r"picture 'a.png' is missing"):
        list(import_samples(folder, "vocot"))


def test_an_empty_folder_says_what_is_expected(tmp_path):
    for name in ("m3cot", "gqa", "onethinker", "scienceqa"):
        with pytest.raises(InputError, match=f"nothing of {name} is there; it needs"):
            list(import_samples(tmp_path, name))
    with pytest.raises(InputError, match="no VoCoT data"):
        list(import_samples(tmp_path, "vocot"))
    with pytest.raises(ConfigError, match="--from is one of mvot, mvot-dare, vocot"):
        import_samples(tmp_path, "coco")
    assert set(_import.IMPORTERS) == {"mvot", "mvot-dare", "vocot", "m3cot", "scienceqa", "gqa", "onethinker"}


def test_only_the_splits_that_are_there_are_read(tmp_path):
    place(tmp_path, "m3cot", 0)
    train = benchmarks.CASES["m3cot"].sources[0][0]
    benchmarks.write(tmp_path / "m3cot", train._replace(file="data/train-00000-of-00001.parquet", rows=train.rows[:1]))
    assert [s.split for s in import_samples(tmp_path / "m3cot", "m3cot")] == ["train", "test", "test"]
