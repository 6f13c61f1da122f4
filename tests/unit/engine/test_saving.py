"""A saved routing comes back as it was, or says exactly what does not fit."""

import copy
import hashlib
import json
import os

import families
import pytest
import torch
from rig import LAYERS, RAGGED, attached, router, stock
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import mmroute
from mmroute.deepen.uniform import Uniform
from mmroute.engine import saving
from mmroute.errors import CheckpointMismatch, MmrouteError
from mmroute.prune.fastv import FastV
from mmroute.prune.schedule import Schedule

NAME = "qwen2_5_vl"
FILES = ["mmroute.json", "mmroute.safetensors"]


@pytest.fixture
def batch():
    return families.make_inputs(NAME, stock(NAME), 3, RAGGED)


@pytest.fixture
def model():
    return copy.deepcopy(stock(NAME))


@pytest.fixture
def folder(tmp_path):
    """A saved router whose weights are not those it starts with."""
    with attached(NAME, training=False, prune=router(vision_keep=0.3), prefix_tokens=1) as routed:
        with torch.no_grad():
            for parameter in routed.parts.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        routed.save_pretrained(tmp_path / "router")
    return tmp_path / "router"


def _logits(routed, batch):
    with torch.no_grad():
        return routed.model.eval()(**batch).logits


def _edit(folder, **changes):
    path = folder / "mmroute.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _rewrite(folder, tensors):
    save_file(tensors, folder / "mmroute.safetensors")
    _edit(folder, weights=hashlib.sha256((folder / "mmroute.safetensors").read_bytes()).hexdigest())


def test_a_training_free_routing_comes_back_whole(tmp_path, batch, model):
    parts = {"prune": Schedule(vision=(1.0, 0.5, 0.2, 0.1), scope="drop"), "deepen": Uniform(deepen_tokens=3)}
    with attached(NAME, training=False, **parts, prefix_tokens=3, strip_padding=True) as routed:
        routed.save_pretrained(str(tmp_path))
        wanted = _logits(routed, batch)
    assert sorted(os.listdir(tmp_path)) == FILES
    routed = mmroute.from_pretrained(tmp_path, base=model)
    assert torch.equal(_logits(routed, batch), wanted)
    assert routed.parts.prune.config == parts["prune"].config
    assert routed.parts.deepen.config == parts["deepen"].config
    assert (routed.controller.prefix_tokens, routed.controller.strip_padding) == (3, True)


def test_a_learned_routing_comes_back_bit_for_bit(folder, batch, model):
    with attached(NAME, training=False, prune=router(vision_keep=0.3), prefix_tokens=1) as routed:
        fresh = _logits(routed, batch)
        saving.load(routed, folder)
        wanted = _logits(routed, batch)
        saved = copy.deepcopy(routed.parts.state_dict())
    assert not torch.equal(fresh, wanted)
    routed = mmroute.from_pretrained(folder, base=model, prune=router(vision_keep=0.3))
    assert torch.equal(_logits(routed, batch), wanted)
    assert routed.controller.executor == "dense"
    assert all(torch.equal(saved[n], t) for n, t in routed.parts.state_dict().items())
    assert load_file(folder / "mmroute.safetensors").keys() == saved.keys()


def test_the_file_says_what_it_is(folder):
    said = json.loads((folder / "mmroute.json").read_text())
    assert said["format"] == 1
    assert said["family"] == NAME
    assert said["shape"]["hidden"] == families.HIDDEN
    assert said["versions"]["mmroute"] == mmroute.__version__
    assert said["prune"]["name"] == "learned:LinearRouter"
    assert said["prune"]["config"]["vision_keep"] == 0.3
    rates = said["prune"]["rates"]
    assert rates[0] == [{"text": None, "vision": None, "latent": None}]
    assert rates[1][2] == {"text": 0.7 * 0.81, "vision": pytest.approx(0.3 * 0.81), "latent": None}


def test_the_base_is_found_by_the_name_it_was_saved_with(tmp_path, tiny_folder):
    checkpoint = tiny_folder(NAME)
    routed = mmroute.attach(mmroute.load(checkpoint), prune=FastV(vision_keep=0.3))
    routed.save_pretrained(tmp_path)
    again = mmroute.from_pretrained(tmp_path)
    assert again.parts.prune.config.vision_keep == 0.3
    assert again.processor is not None
    assert mmroute.from_pretrained(tmp_path, base=str(checkpoint)).family.name == NAME


def test_saving_again_replaces_both_files_and_leaves_nothing_beside(folder, model):
    before = (folder / "mmroute.safetensors").read_bytes()
    routed = mmroute.attach(model, prune=router())
    routed.save_pretrained(folder)
    assert sorted(os.listdir(folder)) == FILES
    assert (folder / "mmroute.safetensors").read_bytes() != before
    saving.load(routed, folder)


def test_a_disk_that_fills_leaves_the_good_files(folder, model, monkeypatch):
    before = {name: (folder / name).read_bytes() for name in FILES}
    calls = []

    def full(fd):
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    routed = mmroute.attach(model, prune=router())
    with pytest.raises(MmrouteError, match="No space left"):
        routed.save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def _cut(folder):
    path = folder / "mmroute.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def _foreign_weights(folder):
    path = folder / "mmroute.safetensors"
    path.write_bytes(b"not safetensors")
    _edit(folder, weights=hashlib.sha256(b"not safetensors").hexdigest())


def _without_one(folder):
    tensors = load_file(folder / "mmroute.safetensors")
    del tensors["prune.rows.2.bias"]
    tensors["prune.rows.9.bias"] = torch.zeros(1)
    _rewrite(folder, tensors)


def _narrow(folder):
    tensors = load_file(folder / "mmroute.safetensors")
    tensors["prune.rows.2.weight"] = torch.zeros(1, 32)
    _rewrite(folder, tensors)


def _shape(**sizes):
    def change(folder):
        said = json.loads((folder / "mmroute.json").read_text())
        _edit(folder, shape={**said["shape"], **sizes})

    return change


def _rates(folder):
    said = json.loads((folder / "mmroute.json").read_text())
    said["prune"]["rates"][2][0]["vision"] = 0.9
    _edit(folder, prune=said["prune"])


BROKEN = {
    "no json": (lambda f: (f / "mmroute.json").unlink(), "mmroute.json is missing"),
    "no weights": (lambda f: (f / "mmroute.safetensors").unlink(), "mmroute.safetensors is missing"),
    "half a json": (lambda f: (f / "mmroute.json").write_text('{"format": 1, '), "cannot be read"),
    "bytes for a json": (lambda f: (f / "mmroute.json").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "foreign json": (lambda f: (f / "mmroute.json").write_text('{"peft_type": "LORA"}'), "not written by mmroute"),
    "a list": (lambda f: (f / "mmroute.json").write_text("[]"), "not written by mmroute"),
    "newer": (lambda f: _edit(f, format=2), "format 2, this version .* reads 1"),
    "unknown field": (lambda f: _edit(f, extra=1), "no such option"),
    "wrong type": (lambda f: _edit(f, prefix_tokens="two"), "prefix_tokens"),
    "truncated": (_cut, "cut short"),
    "not safetensors": (_foreign_weights, "cannot be read"),
    "keys": (_without_one, "prune.rows.2.bias that the file lacks.*prune.rows.9.bias that they lack"),
    "row width": (_narrow, r"prune.rows.2.weight was \[1, 32\].* \[1, 64\]"),
    "family": (lambda f: _edit(f, family="llava"), "family was llava .* here it is qwen2_5_vl"),
    "width": (_shape(hidden=128), "hidden was 128 .* here it is 64"),
    "depth": (_shape(layers=28), f"layers was 28 .* here it is {LAYERS}"),
    "rates": (_rates, "kept 0.9 of vision in layer 2"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_named_and_changes_nothing(folder, model, case):
    spoil, message = BROKEN[case]
    spoil(folder)
    before = sorted(model.__dict__), list(model.state_dict())
    with pytest.raises(CheckpointMismatch, match=message):
        mmroute.from_pretrained(folder, base=model, prune=router(vision_keep=0.3))
    assert (sorted(model.__dict__), list(model.state_dict())) == before
    routed = mmroute.attach(model, prune=router(vision_keep=0.3), prefix_tokens=1)
    weights = copy.deepcopy(routed.parts.state_dict())
    with pytest.raises(CheckpointMismatch, match=message):
        saving.load(routed, folder)
    assert all(torch.equal(weights[n], t) for n, t in routed.parts.state_dict().items())


def test_a_class_is_never_imported_because_a_file_names_it(folder, model):
    with pytest.raises(CheckpointMismatch, match=r"learned:LinearRouter.*pass prune=LinearRouter"):
        mmroute.from_pretrained(folder, base=model)
    _edit(folder, prune={"name": "os:system", "config": {}, "rates": None})
    with pytest.raises(CheckpointMismatch, match="neither in mmroute nor an entry point"):
        mmroute.from_pretrained(folder, base=model)


def test_another_method_or_other_options_are_refused(folder, tmp_path, model):
    with pytest.raises(CheckpointMismatch, match=r"prune was learned:LinearRouter .* here it is fastv"):
        mmroute.from_pretrained(folder, base=model, prune=FastV())
    with pytest.raises(CheckpointMismatch, match="vision_keep"):
        mmroute.from_pretrained(folder, base=model, prune=router(vision_keep=0.5))
    mmroute.attach(model, prune=FastV()).save_pretrained(tmp_path / "fastv")
    said = json.loads((tmp_path / "fastv" / "mmroute.json").read_text())["prune"]
    for wrong, message in (({"name": "fastb"}, "did you mean 'fastv'"), ({"config": {"k": 2}}, "no such option")):
        _edit(tmp_path / "fastv", prune={**said, **wrong})
        with pytest.raises(CheckpointMismatch, match=message):
            mmroute.from_pretrained(tmp_path / "fastv", base=model)


def test_a_model_folder_in_place_of_a_routing_is_pointed_out(tiny_folder):
    with pytest.raises(CheckpointMismatch, match="it holds a model: pass it as base"):
        mmroute.from_pretrained(tiny_folder(NAME))


def test_saving_the_base_while_attached_warns_of_the_extra_keys(tmp_path, model):
    wanted = model.state_dict()
    routed = mmroute.attach(model, prune=router())
    with pytest.warns(UserWarning, match=r"mmroute\.\* keys"):
        model.save_pretrained(tmp_path)
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True, dtype="float32")
    assert all(key.startswith("mmroute.") for key in report["unexpected_keys"])
    assert len(report["unexpected_keys"]) == 6
    assert all(torch.equal(wanted[n], t) for n, t in loaded.state_dict().items())
    assert "mmroute" not in (tmp_path / "config.json").read_text()
    routed.detach()
    model.save_pretrained(tmp_path / "plain")  # no warning: pytest would fail
    with attached(NAME, prune=FastV()) as routed:
        routed.model.save_pretrained(tmp_path / "free")  # nothing learned, nothing extra
