"""A router goes to the Hub with a card whose figures are those of its result files, and comes back from there."""

import copy
import dataclasses
import json

import families
import pytest
import torch
from hubs import Hub
from result_samples import make_result
from rig import attached, stock

import mmroute
from mmroute.bench.schema import write_result
from mmroute.engine import saving
from mmroute.errors import CheckpointMismatch, ConfigError, MmrouteError
from mmroute.prune.fastv import FastV

NAME = "qwen2_5_vl"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return Hub.instead(monkeypatch, tmp_path / "hub", ["mmroute.json", "mmroute.safetensors"])


@pytest.fixture
def routed():
    with attached(NAME, training=False, prune=FastV(vision_keep=0.25, start_layer=1)) as routed:
        yield routed


@pytest.fixture
def measured(tmp_path):
    """A result file of that very pruner."""
    result = make_result()
    method = dataclasses.replace(
        result.method, prune="fastv", config={"prune": {"vision_keep": 0.25, "start_layer": 1}}
    )
    write_result(tmp_path / "r.json", dataclasses.replace(result, method=method))
    return tmp_path / "r.json", result


def test_what_was_pushed_comes_back_by_its_name(hub, routed, measured):
    file, _ = measured
    batch = families.make_inputs(NAME, stock(NAME))
    with torch.no_grad():
        wanted = routed.model(**batch).logits
    address = routed.push_to_hub("me/router", results=[file], base="Qwen/base", private=True, token="t")
    assert address == "hub:me/router"
    assert hub.calls[:2] == [("token", "t"), ("create", "me/router", True, True)]
    assert sorted(p.name for p in (hub.root / "me/router").iterdir()) == [
        "README.md",
        "mmroute.json",
        "mmroute.safetensors",
    ]
    manifest = saving.read_manifest(hub.root / "me/router")
    assert manifest.base == {"id": "Qwen/base", "revision": None}
    again = mmroute.from_pretrained("me/router", base=copy.deepcopy(stock(NAME)))
    with torch.no_grad():
        assert torch.equal(again.model.eval()(**batch).logits, wanted)


def test_the_card_holds_the_measured_figures_and_where_they_come_from(hub, routed, measured):
    file, result = measured
    routed.push_to_hub("me/router", results=[file], base="Qwen/base")
    text = (hub.root / "me/router/README.md").read_text()
    head = text.split("---")[1]
    assert "base_model: Qwen/base\n" in head
    assert "- fastv\n" in head
    low, high = result.quality.wilson95
    assert f"| {result.task.n} | {result.quality.accuracy:.3f} [{low:.3f}, {high:.3f}] |" in text
    assert result.run.command in text
    assert 'from_pretrained("me/router")' in text
    assert '"vision_keep": 0.25' in text


def test_without_results_the_card_says_that_nothing_was_measured(routed, tmp_path):
    routed.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain/README.md").exists()
    routed.save_pretrained(tmp_path / "carded", results=[])
    text = (tmp_path / "carded/README.md").read_text()
    assert "Nothing was measured for this card." in text
    assert str(tmp_path) not in text


def test_figures_of_another_method_or_other_options_are_refused(hub, routed, measured):
    file, _ = measured
    data = json.loads(file.read_text())
    for changed in ({"prune": "random"}, {"config": {"prune": {"vision_keep": 0.9, "start_layer": 1}}}):
        file.write_text(json.dumps({**data, "method": {**data["method"], **changed}}))
        with pytest.raises(ConfigError, match="give results of the same method and options"):
            routed.push_to_hub("me/router", results=[file], base="Qwen/base")
    assert not (hub.root / "me").exists()


def test_a_base_that_others_cannot_load_is_refused(hub, routed):
    routed.model.config._name_or_path = "/somewhere/here"
    try:
        with pytest.raises(ConfigError, match=r"which others cannot load; pass base='owner/name'"):
            routed.push_to_hub("me/router")
    finally:
        routed.model.config._name_or_path = ""
    with pytest.raises(ConfigError, match="repo_id is owner/name, given 'router'"):
        routed.push_to_hub("router", base="Qwen/base")


def test_a_hub_that_refuses_is_one_sentence(hub, routed, monkeypatch):
    def refuses(*args, **kwargs):
        raise ConnectionError("no route\nand more")

    monkeypatch.setattr(hub, "create_repo", refuses, raising=False)
    with pytest.raises(MmrouteError, match=r"me/router could not be written \(no route\); log in with `hf auth login`"):
        routed.push_to_hub("me/router", base="Qwen/base")
    with pytest.raises(CheckpointMismatch, match=r"'me/absent' is no folder, .*hf download me/absent"):
        mmroute.from_pretrained("me/absent")
