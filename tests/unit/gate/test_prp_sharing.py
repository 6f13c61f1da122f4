"""A rater goes to the Hub as it is, with a card whose figures are of this very rater, and comes back from there."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hubs import Hub
from pairs import write_pair, write_rater, write_recipe
from result_samples import make_result

import mmroute
from mmroute import recipe as recipes
from mmroute.backbones.load import load
from mmroute.bench.gate_pair import open_pair
from mmroute.bench.gate_schema import GateEval, GateSummary
from mmroute.bench.schema import write_result
from mmroute.errors import CheckpointMismatch, ConfigError, MmrouteError
from mmroute.gate._manifest import Manifest
from mmroute.gate.prp import Prp
from mmroute.serve import raters
from mmroute.serve.session_raters import TrainedRater
from mmroute.serve.settings import Settings
from mmroute.train.prp_config import sections

RESULTS = Path(__file__).parents[3] / "results"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pair")
    write_pair(made)
    write_rater(made)
    return made


@pytest.fixture(scope="module")
def draft(folder: Path) -> Any:
    return load(folder / "draft", dtype="float32")


@pytest.fixture
def rater(folder: Path, draft: Any) -> Prp:
    return Prp.from_pretrained(folder / "rater", draft)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub.instead(monkeypatch, tmp_path / "hub", ["rater.json", "rater.safetensors"])


def measured(path: Path, artifact: str) -> Path:
    summary = GateSummary(
        recipe="nano", n=200, seed=2, budget=0.4, accuracy=0.8, ci95=(0.7, 0.9), accuracy_draft=0.6,
        accuracy_target=0.7, accuracy_random=0.64, accuracy_oracle=0.85, target_share=0.41, oracle_normalised_gain=None,
        cost_ratio=0.5, cost_ratio_draft=0.1, time_ratio=0.6, rating_overhead=1.2, rating_steps=1,
        rating_flops_share=0.01, by_part={}, artifact=artifact, commit="abc",
    )  # fmt: skip
    write_result(path, GateEval(run=make_result().run, machine=make_result().machine, summary=summary))
    return path


def test_what_was_pushed_comes_back_by_its_name_under_the_same_id(
    hub: Hub, rater: Prp, draft: Any, folder: Path, tmp_path: Path
) -> None:
    file = measured(tmp_path / "r.json", rater.facts["artifact"])
    address = rater.push_to_hub("me/rater", results=[file], draft="me/draft", private=True, token="t")
    assert address == "hub:me/rater"
    assert hub.calls[:2] == [("token", "t"), ("create", "me/rater", True, True)]
    there = hub.root / "me/rater"
    assert sorted(p.name for p in there.iterdir()) == ["README.md", "rater.json", "rater.safetensors"]
    assert (there / "rater.json").read_bytes() == (folder / "rater" / "rater.json").read_bytes()
    again = Prp.from_pretrained("me/rater", draft)
    assert again.facts == rater.facts
    probs = np.random.default_rng(0).dirichlet(np.ones(10), (3, 2))
    one, other = (gate.ratings(torch.tensor(probs), 20) for gate in (again, rater))
    np.testing.assert_array_equal(one.score, other.score)
    with pytest.raises(CheckpointMismatch, match="names no draft"):
        Prp.from_pretrained("me/rater")


def test_a_rater_that_has_changed_since_it_was_read_has_another_id(rater: Prp, tmp_path: Path) -> None:
    before = rater.facts["artifact"]
    assert rater.save_pretrained(tmp_path / "same") == before
    rater.facts["costs"] = [0.2, 1.0]
    assert rater.save_pretrained(tmp_path / "other") != before
    assert Manifest.read(tmp_path / "other").facts == {"costs": [0.2, 1.0]}


def test_the_bundled_raters_card_holds_the_committed_figures_and_what_it_learned_from(tmp_path: Path) -> None:
    files = [RESULTS / "gate" / "prp-small--s0.json", RESULTS / "bench-gate" / "gate.json"]
    rater = Prp.from_pretrained("prp-small")
    assert rater.save_pretrained(tmp_path / "card", results=files) == rater.facts["artifact"]
    text = (tmp_path / "card" / "README.md").read_text()
    single, bench = (json.loads(file.read_text()) for file in files)
    low, high = single["summary"]["ci95"]
    assert f"| {single['summary']['accuracy']:.3f} [{low:.3f}, {high:.3f}] |" in text
    assert f"| 40% | {bench['pooled']['gates']['prp']['at']['0.4']:.3f} |" in text
    assert f"Of the way from random to the oracle: {bench['claims']['oracle_gain']:.3f}" in text
    for run in (single["run"], bench["run"]):
        assert f"- `{run['command']}` at commit {run['commit']}\n" in text
    about = rater.facts
    assert about["pair"]["target_weights"] in text
    assert Manifest.read(tmp_path / "card").base in text
    assert f"{about['n']['all']} questions that both models answered" in text
    for part in about["mix"]:
        assert f"| {part['name']} | {part['task']} | {part['share']} |" in text
    assert "- form `suffix`:" in text
    assert str(tmp_path) not in text


def test_without_results_the_card_says_that_nothing_was_measured(rater: Prp, tmp_path: Path) -> None:
    rater.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "README.md").exists()
    rater.save_pretrained(tmp_path / "carded", results=[])
    text = (tmp_path / "carded" / "README.md").read_text()
    assert "Nothing was measured for this card." in text
    assert "Nothing is known about its training." in text


def test_figures_of_another_rater_or_of_another_kind_are_refused(hub: Hub, rater: Prp, tmp_path: Path) -> None:
    other = measured(tmp_path / "r.json", "0123456789abcdef")
    with pytest.raises(ConfigError, match=f"the rater 0123456789abcdef, the card is of {rater.facts['artifact']}"):
        rater.push_to_hub("me/rater", results=[other], draft="me/draft")
    with pytest.raises(ConfigError, match=r"the card is of .*; give results of the same rater"):
        rater.push_to_hub("me/rater", results=[RESULTS / "bench-gate" / "gate.json"], draft="me/draft")
    write_result(tmp_path / "router.json", make_result())
    with pytest.raises(ConfigError, match="of kind 'result/1'; a rater's card takes 'gate/1' and 'gate-eval/1'"):
        rater.push_to_hub("me/rater", results=[tmp_path / "router.json"], draft="me/draft")
    assert not (hub.root / "me").exists()


def test_a_draft_that_others_cannot_load_is_refused(hub: Hub, rater: Prp, draft: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"was loaded from None, which others cannot load; .*draft='owner/name'"):
        rater.push_to_hub("me/rater")
    rater.facts["pair"] = {"draft": "/somewhere/here", "target": "me/target"}
    with pytest.raises(ConfigError, match="was loaded from '/somewhere/here'"):
        rater.push_to_hub("me/rater")
    rater.facts |= {"pair": {"draft": "me/draft"}, "train": {"train_reasoning": True}}
    with pytest.raises(ConfigError, match="the draft was changed by training"):
        rater.push_to_hub("me/rater")  # its name in training is that of the draft before
    with pytest.raises(ConfigError, match="repo_id is owner/name, given 'rater'"):
        rater.push_to_hub("rater", draft="me/draft")
    assert not (hub.root / "me").exists()


def test_a_hub_that_refuses_is_one_sentence(hub: Hub, rater: Prp, draft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route\nand more")

    monkeypatch.setattr(hub, "create_repo", refuses, raising=False)
    with pytest.raises(MmrouteError, match=r"me/rater could not be written \(no route\); log in with `hf auth login`"):
        rater.push_to_hub("me/rater", draft="me/draft")
    with pytest.raises(CheckpointMismatch, match=r"'me/absent' is no folder, .*`mmroute train prp` wrote.*me/absent"):
        Prp.from_pretrained("me/absent", draft)


def test_what_does_not_fit_is_named_on_both_sides(folder: Path, rater: Prp, tmp_path: Path) -> None:
    target = load(folder / "target", dtype="float32")
    base = Manifest.read(folder / "rater").base
    with pytest.raises(CheckpointMismatch, match=rf"with weights {base[:12]}, this model \(.*/target\) has [0-9a-f]+;"):
        Prp.from_pretrained(folder / "rater", target)
    rater.save_pretrained(tmp_path / "r")
    file = tmp_path / "r" / "rater.json"
    text = file.read_text()
    for old, new, said in (
        ('"prp/1"', '"prp/9"', rf"format 'prp/9', this version of mmroute \({mmroute.__version__}\) reads 'prp/1'"),
        ('"levels": 10', '"levels": 5', "do not fit this version of mmroute"),
        ('"levels": 10', '"degrees": 10', "do not fit this version of mmroute .*degrees"),
    ):
        file.write_text(text.replace(old, new))
        with pytest.raises(CheckpointMismatch, match=said):
            Prp.from_pretrained(tmp_path / "r", rater.model)


def test_routing_parts_and_raters_are_told_apart(folder: Path, draft: Any, tmp_path: Path) -> None:
    mmroute.attach(draft).save_pretrained(tmp_path / "router")
    mmroute.detach(draft)
    with pytest.raises(CheckpointMismatch, match=r"it holds routing parts: mmroute\.from_pretrained reads them"):
        Prp.from_pretrained(tmp_path / "router", draft)
    with pytest.raises(CheckpointMismatch, match=r"it holds a rater of the gate prp: Prp\.from_pretrained reads it"):
        mmroute.from_pretrained(folder / "rater", draft)


def test_recipes_and_the_gateway_take_a_rater_by_its_hub_id(hub: Hub, rater: Prp, draft: Any, folder: Path) -> None:
    rater.push_to_hub("me/rater", draft="me/draft")
    gated, _ = sections(recipes.read(str(write_recipe(folder))))
    found = open_pair(dataclasses.replace(gated, rater="me/rater"), draft, draft)[2]
    assert found.facts["artifact"] == rater.facts["artifact"]
    settings = Settings(rater="me/rater")
    known = raters.manifest(settings)
    assert known is not None
    assert known.base == Manifest.read(folder / "rater").base
    assert TrainedRater("me/rater", draft).artifact == f"prp:{rater.facts['artifact']}"
    with pytest.raises(CheckpointMismatch, match="hf download me/absent"):
        raters.manifest(Settings(rater="me/absent"))
