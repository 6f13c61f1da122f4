"""The page of a trace: one file that refers to nothing outside, with the trace's numbers, whatever the text says."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import mmroute
from mmroute import hub, page
from mmroute.backbones.images import prepare, user_message
from mmroute.cost import estimate_kv_bytes
from mmroute.errors import ConfigError
from mmroute.page.strip import strip

NASTY = "</script><!--<script>alert(1)</script> & \u2028 'quoted' \"too\""


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def shown(tiny_folder, picture):
    """An answer with its full trace, and the view of it."""
    model = mmroute.load(tiny_folder("qwen2_5_vl"))
    messages = user_message("where?", [picture])
    with mmroute.attach(model, prune=hub.load("prune", "random", vision_keep=0.3)) as routed:
        routed.full_trace = True
        answer = routed.answer_many([messages], max_new_tokens=5)[0]
        batch = prepare(model, model.processor, messages)
        grid = routed.family.image_grid(model, batch)[0]
        vision = (routed.controller.table[batch["input_ids"][0]] == 1).tolist()
    words = model.processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    view = page.view(
        answer, picture, grid, words, vision, title="maze", recipe="random", question=NASTY, relevant=[[0, 1]]
    )
    return answer, view, vision


class Outside(HTMLParser):
    """Collects whatever a browser would fetch, and the scripts."""

    def __init__(self):
        super().__init__()
        self.fetched, self.scripts, self.in_script = [], [], False

    def handle_starttag(self, tag, attrs):
        self.in_script = tag == "script"
        self.fetched += [v for k, v in attrs if k in ("src", "href", "action") and v]
        self.scripts += [""] if tag == "script" else []

    def handle_endtag(self, tag):
        self.in_script = False

    def handle_data(self, data):
        if self.in_script:
            self.scripts[-1] += data


def test_a_view_says_what_the_trace_says(shown):
    answer, view, vision = shown
    prompt = answer.trace.calls[0]
    assert view.kept == [layer.kept[0] for layer in prompt.layers]
    assert [t["vision"] for t in view.tokens if t["vision"] >= 0] == list(range(sum(vision)))
    assert sum(vision) == view.grid[0] * view.grid[1]
    # No slot is ever given up here, so the last column is what the cache holds in the end.
    assert sum(layer[-1] for layer in view.kv) == estimate_kv_bytes(answer.trace)
    assert sum(layer[0] for layer in view.kv) == estimate_kv_bytes(answer.trace, "prefill")
    assert all(len(layer) == 1 + len(answer.hops) for layer in view.kv)
    assert view.text == answer.text


def test_the_picture_in_the_page_is_the_picture(shown, picture):
    data = base64.b64decode(shown[1].image.removeprefix("data:image/png;base64,"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(picture))


def test_the_page_is_one_file_and_holds_its_data_whatever_the_text_is(shown):
    html = page.render([shown[1]])
    read = Outside()
    read.feed(html)
    assert read.fetched == []
    assert not re.search(r"url\(|@import|https?://|fetch\(|XMLHttp|innerHTML|document\.write", html)
    assert len(read.scripts) == 1
    data = read.scripts[0].partition("const DATA = ")[2].partition(";\n")[0]
    (view,) = json.loads(data)
    assert view["question"] == NASTY
    assert view["kept"] == shown[1].kept
    assert "<" not in data  # neither `</script` nor `<!--` can end or swallow the script


def test_a_trace_of_counts_alone_and_words_that_do_not_fit_are_refused(shown, picture):
    answer, view, vision = shown
    words = [t["text"] for t in view.tokens]
    with pytest.raises(ConfigError, match="2 words given for a prompt of"):
        page.view(answer, picture, view.grid, words[:2], vision[:2], title="", recipe="", question="")
    for layer in answer.trace.calls[0].layers:
        layer.kept, before = None, layer.kept
        with pytest.raises(ConfigError, match=r"full_trace = True"):
            page.view(answer, picture, view.grid, words, vision, title="", recipe="", question="")
        layer.kept = before


def test_the_strip_darkens_what_each_layer_left_out(shown):
    _, view, vision = shown
    root = ElementTree.fromstring(strip(view))
    groups = [node for node in root if node.tag.endswith("}g")]
    assert len(groups) == len(view.kept)
    first = vision.index(True)
    for group, kept in zip(groups, view.kept, strict=True):
        ran = sum(first <= i < first + sum(vision) for i in kept)
        path = next(node for node in group if node.tag.endswith("}path"))
        assert path.get("d").count("M") == sum(vision) - ran
        assert f"{ran} of {sum(vision)} patches" in "".join(group.itertext())
