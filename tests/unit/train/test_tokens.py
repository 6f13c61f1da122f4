"""A draft that learns to write its ratings: on its own vocabulary, read alike everywhere, otherwise what it was."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs import SMALL, write_pair, write_recipe

from mmroute import hub
from mmroute import recipe as recipes
from mmroute.backbones.images import prepare
from mmroute.backbones.load import load
from mmroute.engine.attach import attach
from mmroute.errors import CheckpointMismatch, ConfigError, UnsupportedBackbone
from mmroute.gate._digits import Digits
from mmroute.gate._words import SWITCH
from mmroute.gate.prp import Prp
from mmroute.session import Session
from mmroute.tasks._mixture import Part, draw_mixture
from mmroute.tasks._texts import VOCABULARY
from mmroute.train.folder import write_folder
from mmroute.train.prompts import Prompts, chats_of
from mmroute.train.prp import train_prp
from mmroute.train.prp_config import PrpConfig, sections
from mmroute.train.rollouts import roll_out
from mmroute.train.small_model import build
from mmroute.train.tokens import _drawn, _plain, _rated, answers_of, divergence, fit_tokens
from mmroute.train.written import Read, padded

MIX = [Part(task="frozenlake:nano", share=1), Part(task="maze:nano", share=1)]
LONGEST = 8


def fresh(folder: Path) -> Any:
    return load(folder / "draft", dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pair")
    write_pair(made)
    return made


@pytest.fixture(scope="module")
def chats(folder: Path) -> list:
    return chats_of(fresh(folder), draw_mixture(MIX, 80, "val"), hub.load("think", "text"))


def labels(chats: list) -> np.ndarray:
    """Something the prompt shows: which world it is."""
    is_maze = np.array([float("maze" in chat[0]["content"][-1]["text"]) for chat in chats])
    return np.stack([1 - is_maze, np.full(len(chats), 0.8)], 1)


def taught(folder: Path, chats: list, **changes: Any) -> tuple[Prp, list[list[int]], list[float]]:
    """The gate on its tuned draft, what the draft wrote before, and the validation errors."""
    gate = Prp(form="tokens", calibration="none").bind(fresh(folder))
    wrote = answers_of(gate, chats, LONGEST)
    y, held = labels(chats), np.arange(len(chats)) % 4 == 0
    given = {"batch": 20, "max_epochs": 15, "patience": 15, "warmup": 5, "lr_draft": 3e-3} | changes
    errors = fit_tokens(gate, chats, wrote, y, y, ~held, held, PrpConfig(**given))
    gate.model.processor.chat_template = gate.reader.template
    return gate, wrote, errors


@pytest.fixture(scope="module")
def trained(folder: Path, chats: list) -> tuple[Prp, list[list[int]], list[float]]:
    return taught(folder, chats)


# ---------------------------------------------------------------------- the vocabulary


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_a_stock_vocabulary_has_all_the_words_and_a_prompt_is_the_same_until_a_rating_is_asked_for(
    family: str, tiny_folder: Any
) -> None:
    model = load(tiny_folder(family))
    digits = Digits.of(model.processor)
    tokenizer = model.processor.tokenizer
    assert tokenizer.decode(digits.prefix) == "<rate>"
    assert tokenizer.decode([*digits.levels, digits.newline]) == "0123456789\n"
    chat = [{"role": "user", "content": [{"type": "text", "text": "how many?"}]}]
    before = prepare(model, model.processor, [chat])["input_ids"].tolist()
    model.processor.chat_template = digits.template
    assert prepare(model, model.processor, [chat])["input_ids"].tolist() == before
    asked = prepare(model, model.processor, [chat], {SWITCH: True})["input_ids"].tolist()
    assert asked == [[*before[0], *digits.prefix]]
    assert dataclasses.replace(digits, ratings=1) == Digits.of(model.processor, 1)  # a template that has the switch


def test_a_vocabulary_that_cannot_write_a_rating_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Any
) -> None:
    with pytest.raises(UnsupportedBackbone, match="without changing the prompt's own tokens"):
        Digits.of(load(tiny_folder("chameleon")).processor)  # its processor ends every prompt in a token of its own
    old = [f"<unused{i}>" if word in ("<rate>", "\n", "7") else word for i, word in enumerate(VOCABULARY)]
    monkeypatch.setattr("mmroute.train.folder.VOCABULARY", old)
    write_folder(tmp_path / "old", build(SMALL, old, 0), "", {})
    with pytest.raises(UnsupportedBackbone, match=r"none for '7', '\\n'; train the form suffix"):
        Prp(form="tokens").bind(load(tmp_path / "old"))
    with pytest.raises(ConfigError, match="levels is 10"):
        Prp(form="tokens", levels=5)


# ---------------------------------------------------------------------- learning


def test_a_draft_learns_to_write_what_prompts_show(trained: tuple, chats: list) -> None:
    gate, _, errors = trained
    assert min(errors) < 0.25 * errors[0]
    with attach(gate.model) as routed:
        rolled, _ = roll_out(routed, chats, max_new_tokens=4, template={SWITCH: True})
    said = [gate.model.processor.tokenizer.decode(each.ids[:3]) for each in rolled]
    for text, (draft, _) in zip(said, labels(chats), strict=True):
        first, second, newline = text.split(" ")
        assert (int(first) > 4) == (draft > 0.5)
        assert int(second) in (6, 7, 8)
        assert newline == "\n"
    assert all(p.requires_grad for p in gate.model.parameters())
    assert gate.model.dtype == torch.float32


def test_words_alone_move_the_rows_of_the_rating_and_nothing_else(folder: Path, chats: list) -> None:
    before = {name: p.clone() for name, p in fresh(folder).named_parameters()}
    gate, _, _ = taught(folder, chats[:40], backbone="words", max_epochs=1, lr_draft=0.02)
    digits = gate.reader
    own = sorted({*digits.prefix, *digits.levels, digits.newline})
    moved = {name: p for name, p in gate.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("embed_tokens" in name or "lm_head" in name for name in moved)
    for name, p in moved.items():
        assert (p != before[name]).any(1).nonzero()[:, 0].tolist() == own


@pytest.mark.slow
def test_its_answers_are_held_to_what_they_were(trained: tuple, folder: Path, chats: list) -> None:
    before, (loose, wrote, _) = fresh(folder), trained
    held, _, _ = taught(folder, chats, beta=5.0)
    answer, real = padded(wrote[:20])

    def drift(gate: Prp) -> tuple[float, float]:
        with torch.no_grad():
            was, read = _plain(Read(before, chats[:20]), answer, real), Read(gate.model, chats[:20])
            rated = _rated(read, gate.reader, _drawn(read, gate.reader, None), answer, real)[3]
            return float(divergence(_plain(read, answer, real), was, real)), float(divergence(rated, was, real))

    for tight, free in zip(drift(held), drift(loose), strict=True):
        assert tight < 0.3 * free


def test_a_rating_in_this_process_is_the_one_that_is_written_and_leaves_the_session_as_it_was(
    trained: tuple, chats: list
) -> None:
    gate, _, _ = trained
    asked = chats[:6]
    with attach(gate.model) as routed:
        made = Session(routed, reserve=8)
        made.append(prepare(routed.model, routed.processor, asked))
        seen, calls = made.cache.seen, len(made.cache.trace.calls)
        rated = gate.rate_session(made)
        assert (made.cache.seen, len(made.cache.trace.calls)) == (seen, calls)
        plain, _ = roll_out(routed, asked, max_new_tokens=6)
        gated, _ = roll_out(routed, asked, max_new_tokens=6, rater=gate)
        assert [r.ids for r in plain] == [r.ids for r in gated]
        singles = []
        for chat in asked:
            alone = Session(routed, reserve=8)
            alone.append(prepare(routed.model, routed.processor, [chat]))
            singles.append(gate.rate_session(alone))
    np.testing.assert_allclose(rated.draft, [one.draft[0] for one in singles], atol=1e-5)
    prompts = Prompts.read(gate.model, asked)
    np.testing.assert_allclose(prompts.probs(gate)[:, 1].numpy(), rated.target_probs, atol=1e-5)
    batch = prepare(gate.model, gate.model.processor, asked, {SWITCH: True})
    with torch.no_grad():
        logits = gate.model(**batch).logits[:, -1]
    first = logits[:, list(gate.reader.levels)].softmax(-1).numpy()
    np.testing.assert_allclose(first, rated.draft_probs, atol=1e-5)
    assert (rated.overhead.tokens_out, rated.overhead.tokens_in) == (2, 2)


def test_a_draft_that_writes_something_else_is_unrated(folder: Path, chats: list) -> None:
    gate = Prp(form="tokens", calibration="none").bind(fresh(folder))  # never trained
    rated = gate.ratings(Prompts.read(gate.model, chats[:4]).probs(gate), 20)
    assert np.isnan(rated.score).all()


def test_ratings_do_not_see_the_answer_and_the_draft_as_it_was_has_no_drift(folder: Path, chats: list) -> None:
    model = fresh(folder)
    digits = Digits.of(model.processor)
    with torch.no_grad():
        read = Read(model, chats[:3])
        said = _drawn(read, digits, torch.Generator().manual_seed(0))
        one = _rated(read, digits, said, *padded([[9, 10, 11], [12], [13, 14]]))
        other = _rated(read, digits, said, *padded([[20, 21, 22], [23], [24, 25]]))
        for a, b in zip(one[:3], other[:3], strict=True):
            torch.testing.assert_close(a, b)
        wrote = padded([[9, 10, 11], [12], [13, 14]])
        plain = _plain(read, *wrote)
        assert divergence(plain, _plain(Read(model, chats[:3]), *wrote), wrote[1]) == 0
        assert divergence(one[3], plain, wrote[1]) > 0  # the rating stands in front


def test_divergence_by_hand_over_real_tokens_alone() -> None:
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    logits = torch.stack([p.log(), torch.tensor([0.9, 0.1]).log()])[None]
    reference = torch.stack([q.log(), q.log()])[None]
    found = divergence(logits, reference, torch.tensor([[True, False]]))
    assert float(found) == pytest.approx(float((p * (p / q).log()).sum()))


# ---------------------------------------------------------------------- from end to end


def test_adapters_are_merged_into_the_draft(folder: Path, chats: list) -> None:
    before = {name: p.clone() for name, p in fresh(folder).named_parameters()}
    gate, _, _ = taught(folder, chats[:40], backbone="lora", max_epochs=1, lr_draft=0.02)
    after = dict(gate.model.named_parameters())
    assert after.keys() == before.keys()
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert moved and all("layers" in name and name.endswith("_proj.weight") for name in moved)


def test_a_run_leaves_a_draft_that_any_server_can_load_and_its_artifact(folder: Path, tmp_path: Path) -> None:
    sets = ["gate.form=tokens", "train.max_epochs=20", "train.batch=8", "train.lr_draft=0.003", "train.warmup=2"]
    sets += ["train.patience=20"]
    recipe = recipes.read(str(write_recipe(folder)), sets)
    draft, target = fresh(folder), load(folder / "target", dtype="float32")
    train_prp(recipe, draft, target, tmp_path)
    back = load(tmp_path / "draft", dtype="float32")
    gate = Prp.load(tmp_path / "rater", back)
    assert (gate.config.form, set(gate.facts["answers"])) == ("tokens", {"n", "plain", "rated"})
    assert not (tmp_path / "rater" / "rater.safetensors").exists()
    assert SWITCH in back.processor.chat_template
    asked = chats_of(back, draw_mixture(MIX[:1], 5, "test"), recipe.build("think"))
    bound = Prp(form="tokens", calibration="none").bind(draft)
    torch.testing.assert_close(Prompts.read(back, asked).probs(gate), Prompts.read(draft, asked).probs(bound))
    with pytest.raises(CheckpointMismatch, match="load the draft it belongs to"):
        Prp.load(tmp_path / "rater", fresh(folder))


def test_answers_behind_digits_are_not_rewarded_here(folder: Path) -> None:
    sets = ["gate.form=tokens", "train.rollouts=true", "train.objective=grpo"]
    recipe = recipes.read(str(write_recipe(folder)), sets)
    with pytest.raises(ConfigError, match="leave them out"):
        sections(recipe)
