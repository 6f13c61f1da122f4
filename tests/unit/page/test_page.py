"""The page of a trace: one file that refers to nothing outside, with the trace's numbers, whatever the text says."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from page_samples import NASTY, picture_of_noise, told
from PIL import Image

import mmroute
from mmroute import hub, page
from mmroute.backbones.images import user_message
from mmroute.cost import estimate_kv_bytes, kv_bytes_per_slot
from mmroute.errors import ConfigError
from mmroute.page.story import tell
from mmroute.page.strip import strip
from mmroute.tokens import Modality
from mmroute.trace import Trace


@pytest.fixture(scope="module")
def picture():
    return picture_of_noise()


@pytest.fixture(scope="module")
def shown(tiny_folder):
    """A full trace with its story, and the view of it."""
    trace = told(tiny_folder("qwen2_5_vl"))
    return trace, page.view(trace)


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
    trace, view = shown
    columns = sum(sum(call.new[0]) for call in trace.calls)
    assert len(view.words) == len(view.modality) == len(view.hop) == columns
    assert view.hop[0] == 0 and view.hop[-1] == len(view.hops)
    for layer, ran in enumerate(view.ran):
        assert ran == [c for call in trace.calls for c in call.layers[layer].kept[0]]
        assert len(ran) == sum(sum(call.layers[layer].ran[0]) for call in trace.calls)
        assert sum(view.again[layer].values()) == sum(sum(call.layers[layer].again) for call in trace.calls)
    (shown_picture,) = view.pictures
    vision = [c for c, kind in enumerate(view.modality) if kind == Modality.VISION]
    assert vision == list(range(vision[0], vision[0] + shown_picture["rows"] * shown_picture["columns"]))
    assert shown_picture["start"] == vision[0]
    assert view.text == trace.story.text


def test_what_is_held_by_hop_is_what_the_cache_holds(shown):
    trace, view = shown
    assert sum(layer[-1] for layer in view.kv) == estimate_kv_bytes(trace)
    assert sum(layer[0] for layer in view.kv) == estimate_kv_bytes(trace, "prefill")
    slot = kv_bytes_per_slot(trace.shape)
    assert any(map(bool, view.lost))
    for layer, (ran, lost) in enumerate(zip(view.ran, view.lost, strict=True)):
        twice = sum(view.again[layer].values())
        for hop in range(len(view.kv_full)):
            held = [c for c in ran if view.hop[c] <= hop and lost.get(c, hop + 1) > hop]
            assert (len(held) + twice) * slot == view.kv[layer][hop]


def test_scores_stand_at_the_columns_that_competed(shown):
    _, view = shown
    for layer, scores in enumerate(view.scores):
        assert len(scores) == len(view.words)
        ranked = {c for c, score in enumerate(scores) if score is not None}
        vision = {c for c, kind in enumerate(view.modality) if kind == Modality.VISION}
        assert max(c for c in range(len(scores)) if view.hop[c] == 0) not in ranked  # protected: it ran in any case
        assert ranked and ranked <= vision | {c for c in range(len(scores)) if view.hop[c] == 0}
        ran = ranked & vision & set(view.ran[layer])
        worst, best = min(scores[c] for c in ran), max(scores[c] for c in (ranked & vision) - ran)
        assert worst >= best  # of what competes the highest run


def test_words_are_the_ids_that_entered(shown):
    _, view = shown
    prompt = "".join(view.words[c] for c in range(len(view.words)) if view.hop[c] == 0)
    assert "quoted" in prompt and "<|im_start|>" in prompt
    assert all(view.words[c] == "" for c, kind in enumerate(view.modality) if kind == Modality.VISION)


@pytest.mark.parametrize("family", ["llava", "chameleon"])
def test_the_picture_is_cropped_as_the_model_saw_it(tiny_folder, picture, family):
    model = mmroute.load(tiny_folder(family))
    messages = user_message("where?", [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    with mmroute.attach(model, prune=hub.load("prune", "random", vision_keep=0.3)) as routed:
        routed.full_trace = True
        trace = tell(routed, messages, routed.answer_many([messages], max_new_tokens=2)[0])
    view = page.view(trace)
    assert [p["rows"] * p["columns"] for p in view.pictures] == [16, 16]
    for p, given in zip(view.pictures, (picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), strict=True):
        assert all(view.modality[p["start"] + i] == Modality.VISION for i in range(16))
        seen = Image.open(io.BytesIO(base64.b64decode(p["png"].partition(",")[2])))
        assert seen.size == (32, 32)
        middle = np.asarray(given)[:, 8:40].astype(int)  # 48 x 32 px, its shorter side is the model's
        assert np.abs(np.asarray(seen).astype(int) - middle).max() <= 1  # rounding there and back


def test_the_picture_in_the_page_is_the_picture(shown, picture):
    data = base64.b64decode(shown[1].pictures[0]["png"].removeprefix("data:image/png;base64,"))
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
    assert view["ran"] == shown[1].ran
    assert "<" not in data  # neither `</script` nor `<!--` can end or swallow the script


def test_a_page_of_a_trace_read_back_is_the_same_page(shown):
    trace, view = shown
    assert page.render([page.view(Trace.from_json(trace.to_json()))]) == page.render([view])


def test_what_a_page_cannot_show_is_refused(shown):
    trace, _ = shown
    counts = Trace.from_json(trace.to_json())
    for call in counts.calls:
        call.modality = call.ids = None
    with pytest.raises(ConfigError, match=r"how many positions ran, not which; .*--trace FILE"):
        page.view(counts)
    silent = Trace.from_json(trace.to_json())
    silent.story = None
    with pytest.raises(ConfigError, match="no words and pictures"):
        page.view(silent)
    two = Trace.from_json(trace.to_json())
    two.calls[0].new *= 2
    with pytest.raises(ConfigError, match="one conversation, this trace has 2 rows"):
        page.view(two)


def test_the_strip_darkens_what_each_layer_left_out(shown):
    _, view = shown
    root = ElementTree.fromstring(strip(view))
    groups = [node for node in root if node.tag.endswith("}g")]
    assert len(groups) == len(view.ran)
    (p,) = view.pictures
    patches = range(p["start"], p["start"] + p["rows"] * p["columns"])
    for group, kept in zip(groups, view.ran, strict=True):
        ran = sum(c in patches for c in kept)
        path = next(node for node in group if node.tag.endswith("}path"))
        assert path.get("d").count("M") == len(patches) - ran
        assert f"{ran} of {len(patches)} patches" in "".join(group.itertext())
