"""Exports are what the named tools read: their keys, their placeholders, their order of pictures."""

import base64
import csv
import importlib.util
import io
import json
import os

import pytest
import yaml
from made import picture, sample
from PIL import Image

from mmroute.errors import ConfigError, InputError
from mmroute.tasks import _export, _io
from mmroute.tasks.base import Choice, Hop


@pytest.fixture
def samples():
    return [sample(i) for i in range(3)]


def _pixels(path):
    return Image.open(path).tobytes()


def test_every_format_is_written_whole_and_counted(tmp_path, samples):
    pytest.importorskip("pyarrow")
    for name in set(_export.EXPORTERS) - {"mvot"}:
        assert _export.export(iter(samples), name, tmp_path / name) == 3
    assert sorted(os.listdir(tmp_path)) == ["llava", "lmms", "sharegpt", "trl", "vlmeval"]


def test_an_unknown_format_and_no_samples_are_refused(tmp_path, samples):
    with pytest.raises(ConfigError, match="no export format named 'csv'; one of trl, llava"):
        _export.export(samples, "csv", tmp_path / "x")
    for name in _export.EXPORTERS:
        with pytest.raises(InputError, match="no samples to"):
            _export.export([], name, tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_trl_blocks_have_exactly_their_keys_and_pictures_count_over_all_roles(tmp_path, samples):
    _export.export(samples, "trl", tmp_path / "t")
    rows = [json.loads(line) for line in (tmp_path / "t" / "metadata.jsonl").read_text().splitlines()]
    blocks = [b for m in rows[1]["messages"] for b in m["content"]]
    assert [m["role"] for m in rows[1]["messages"]] == ["user", "assistant"]
    assert {frozenset(b) for b in blocks} == {frozenset({"type"}), frozenset({"type", "text"})}
    assert sum(b["type"] == "image" for b in blocks) == len(rows[1]["file_names"]) == 2
    assert blocks[-1] == {"type": "text", "text": "The answer is B."}
    assert _pixels(tmp_path / "t" / rows[1]["file_names"][1]) == picture(101).tobytes()


def test_datasets_opens_the_trl_folder_with_pictures(tmp_path, samples):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    _export.export(samples, "trl", tmp_path / "t")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "t"), cache_dir=str(tmp_path / "c"))["train"]
    assert loaded[2]["images"][0].tobytes() == picture(2).tobytes()
    assert "image" not in loaded[2]["messages"][0]["content"][0], "an `image: None` would break TRL"


def test_pictures_are_listed_in_the_order_the_turns_show_them(tmp_path):
    hops = [Hop("one", image=2), Hop("two", image=0)]  # the second thought shows the question's picture again
    item = sample(images=[picture(1), picture(2), picture(3)], prompt_images=[1, 0], hops=hops)
    _export.export([item], "sharegpt", tmp_path / "s")
    (row,) = json.loads((tmp_path / "s" / "data.json").read_text())
    shown = [_pixels(tmp_path / "s" / name) for name in row["images"]]
    assert shown == [picture(v).tobytes() for v in (2, 1, 3, 1)]
    assert row["messages"][1]["content"] == "one<image>\ntwo<image>\nThe answer is B."


def test_sharegpt_tells_llama_factory_where_things_are(tmp_path, samples):
    _export.export(samples, "sharegpt", tmp_path / "s")
    entry = json.loads((tmp_path / "s" / "dataset_info.json").read_text())["mmroute"]
    row = json.loads((tmp_path / "s" / entry["file_name"]).read_text())[0]
    assert {row.keys() >= {column} for column in entry["columns"].values()} == {True}
    text = "".join(m["content"] for m in row["messages"])
    assert text.count("<image>") == len(row["images"]) == 2
    assert {m[entry["tags"]["role_tag"]] for m in row["messages"]} == {"user", "assistant"}


def test_llava_has_one_name_or_a_list_and_none_without_pictures(tmp_path, samples):
    plain = sample(8, hops=[Hop("Go right.")], images=[picture(8)])
    text = sample(9, hops=[], images=[], prompt_images=[])
    _export.export([samples[0], plain, text], "llava", tmp_path / "l")
    rows = json.loads((tmp_path / "l" / "data.json").read_text())
    assert [r.get("image") for r in rows] == [
        ["images/000000_0.png", "images/000000_1.png"],
        "images/000001_0.png",
        None,
    ]
    assert [t["from"] for t in rows[0]["conversations"]] == ["human", "gpt"]
    assert rows[1]["conversations"][0]["value"].startswith("<image>\nWhere does")
    assert rows[1]["conversations"][1]["value"] == "Go right. The answer is B."


@pytest.mark.parametrize("name", ["llava", "sharegpt"])
def test_a_text_that_would_count_as_a_picture_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="a text holds '<image>'"):
        _export.export([sample(question="What is <image>?")], name, tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_options_are_added_only_where_the_question_lacks_them():
    texts = [Choice("A", "red"), Choice("B", "blue")]
    assert _export.question_text("Which?", texts) == "Which?\nA. red\nB. blue"
    assert _export.question_text("Which?\nA. red\nB. blue", texts) == "Which?\nA. red\nB. blue"
    assert _export.question_text("Which?", [Choice("red"), Choice("blue")]) == "Which?"


def _table(folder):
    (path,) = folder.iterdir()
    with path.open(newline="") as file:
        return path.name, list(csv.DictReader(file, delimiter="\t"))


def test_vlmeval_table_survives_tabs_newlines_and_quotes(tmp_path, samples):
    _export.export(samples, "vlmeval", tmp_path / "v")
    name, rows = _table(tmp_path / "v")
    assert name == "mmroute_maze_test.tsv"
    assert [r["index"] for r in rows] == ["0", "1", "2"]
    assert rows[0]["question"] == samples[0].question
    assert (rows[0]["A"], rows[0]["C"], rows[0]["answer"]) == ("red plate", "C", "B")
    opened = Image.open(io.BytesIO(base64.b64decode(rows[1]["image"])))
    assert opened.tobytes() == picture(1).tobytes()


def test_vlmeval_turns_words_into_letters_but_leaves_yes_no_alone(tmp_path, samples):
    colours = sample(choices=[Choice("red"), Choice("green")], answer="green", answer_index=1, task="arrows")
    answers = sample(choices=[Choice("yes"), Choice("no")], answer="no", answer_index=1, task="gridspatial")
    _export.export([colours], "vlmeval", tmp_path / "c")
    _export.export([answers], "vlmeval", tmp_path / "y")
    _export.export([answers, samples[0]], "vlmeval", tmp_path / "m")
    (row,) = _table(tmp_path / "c")[1]
    assert (row["A"], row["B"], row["answer"]) == ("red", "green", "B")
    (row,) = _table(tmp_path / "y")[1]
    assert row["answer"] == "no"
    assert "A" not in row
    name, rows = _table(tmp_path / "m")
    assert name == "mmroute_mixed.tsv"
    assert (rows[0]["B"], rows[0]["C"], rows[0]["answer"]) == ("no", "", "B")


def test_vlmeval_writes_several_pictures_as_a_list(tmp_path):
    _export.export([sample(prompt_images=[0, 1])], "vlmeval", tmp_path / "v")
    assert len(json.loads(_table(tmp_path / "v")[1][0]["image"])) == 2


class _Loader(yaml.SafeLoader):
    """Reads `!function` as the name that follows."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_lmms_yaml_names_functions_that_exist_and_score(tmp_path, samples):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    _export.export(samples, "lmms", tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.yaml")
    config = yaml.load(path.read_text(), Loader=_Loader)
    assert config["task"] == path.stem == "mmroute_maze"
    loaded = datasets.load_dataset(
        config["dataset_path"], cache_dir=str(tmp_path / "cache"), **config["dataset_kwargs"]
    )[config["test_split"]]
    doc = loaded[1]
    module = config["doc_to_text"].split(".")[0]
    place = importlib.util.spec_from_file_location(module, tmp_path / "out" / f"{module}.py")
    functions = importlib.util.module_from_spec(place)
    place.loader.exec_module(functions)

    def call(key, *args):
        return getattr(functions, config[key].split(".")[1])(*args)

    assert [i.tobytes() for i in call("doc_to_visual", doc)] == [picture(1).tobytes()]
    assert call("doc_to_text", doc, {"pre_prompt": "Q: "}).startswith("Q: Where does the agent end?")
    assert doc[config["doc_to_target"]] == "B"
    assert call("process_results", doc, ["The answer is B."]) == {config["metric_list"][0]["metric"]: 1.0}
    assert call("process_results", doc, ["The answer is A. B"]) == {"acc": 0.0}


def test_an_export_can_be_made_of_what_was_read_back(tmp_path, samples):
    _io.write(samples, tmp_path / "data", "jsonl")
    _export.export(_io.read(tmp_path / "data"), "trl", tmp_path / "a")
    _export.export(samples, "trl", tmp_path / "b")
    for name in ("metadata.jsonl", "images/000002_1.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
