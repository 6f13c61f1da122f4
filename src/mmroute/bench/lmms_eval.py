"""mmroute as a chat model of lmms-eval: any model folder or Hub id under any recipe, with token counts and costs.

    lmms-eval --model mmroute --model_args pretrained=DIR,recipe=dare-lh,traces=out.jsonl --tasks pope,mmstar

What lmms-eval has no field for (FLOPs, KV bytes, kept shares, hops) goes to the side file `traces`, one line per
(task, doc_id). Harness rules often match the whole output or its first character, so a task whose answers are letters
or yes and no is given the answer that was read out of the completion, and the side file holds all of it.

Source: the model interface of lmms-eval 0.7.3 (chat requests are 6-tuples; its guide says 5).
Deviates: likelihoods are the stock model's: recipes say nothing about scoring fixed texts.
"""

import json
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from mmroute import cost, hub
from mmroute import recipe as recipes
from mmroute.backbones.images import prepare
from mmroute.backbones.load import load
from mmroute.bench import items
from mmroute.errors import ConfigError, MissingExtra
from mmroute.tasks import _parse
from mmroute.tasks._export import lmms_sample
from mmroute.tasks._rows import SCHEMA
from mmroute.tasks.base import Generated

try:
    from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
    from lmms_eval.api.model import lmms
except ModuleNotFoundError:
    raise MissingExtra(
        "mmroute as a model of lmms-eval",
        "lmms-eval",
        extra="",
        remedy="it lives in an environment of its own: make .venv-lmms",
    ) from None

__all__ = ["Routed"]

_LETTER_ASKED = re.compile(r"option'?s? letter|letter from the given choices|\(?[A-D]\)?[.:] ", re.IGNORECASE)
_YES_NO_ASKED = re.compile(r"\byes or no\b|\byes\s*/\s*no\b", re.IGNORECASE)


class Routed(lmms):
    """A loaded model under a recipe, for lmms-eval's chat tasks."""

    is_simple = False

    def __init__(
        self,
        pretrained: str = "tiny",
        recipe: str = "none",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        traces: str = "",
        extract: bool = True,
        **other: Any,
    ) -> None:
        """Loads the model.

        Args:
            pretrained: bundled name, checkpoint folder or Hub id.
            recipe: name or file of a recipe.
            batch_size: conversations answered at once.
            device: where the model is put.
            dtype: of the weights.
            traces: side file for costs, JSON lines; empty writes none.
            extract: give tasks that want a letter or yes and no just that.
            other: what lmms-eval passes to every model.

        Raises:
            ConfigError: an argument that is none of these.
        """
        super().__init__()
        unknown = sorted(set(other) - {"max_batch_size"})
        if unknown:
            known = "pretrained, recipe, batch_size, device, dtype, traces, extract"
            raise ConfigError(f"model_args: no argument {unknown[0]!r}; known: {known}")
        self.recipe = recipes.read(recipe)
        self.loaded = load(pretrained, dtype=dtype, device=device)
        self.batch = int(batch_size)
        self.traces = Path(traces) if traces else None
        self.extract = extract if isinstance(extract, bool) else str(extract).casefold() == "true"

    # ------------------------------------------------------------------ generation

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Completions in the order of the requests."""
        out: list[GenerationResult] = []
        with recipes.equip(self.loaded, self.recipe) as (routed, think):
            asked = [self._request(routed, think, r) for r in requests]
            for (limit, temperature), alike in groupby(asked, key=lambda a: (a["limit"], a["temperature"])):
                part = list(alike)
                for start in range(0, len(part), self.batch):
                    out += self._answered(routed, think, part[start : start + self.batch], limit, temperature)
        return out

    def _answered(
        self, routed: Any, think: Any, asked: list[dict[str, Any]], limit: int | None, temperature: float
    ) -> list[GenerationResult]:
        chats = [a["messages"] for a in asked]
        answers = routed.answer_many(chats, think=think, max_new_tokens=limit, temperature=temperature)
        return [self._result(a, answer) for a, answer in zip(asked, answers, strict=True)]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """What was said in each round, request by request; the task writes the next round from the last answers."""
        out = []
        with recipes.equip(self.loaded, self.recipe) as (routed, think):
            for request in requests:
                context, settings, to_visual, to_text, doc_id, task, split = request.args
                doc = self.task_dict[task][split][doc_id]
                visuals, text, ended, said, info = to_visual(doc), context, False, list[str](), None
                while not ended:
                    message = {"role": "user", "content": [*map(_image, visuals or []), {"type": "text", "text": text}]}
                    asked = self._asked([message], settings, task, doc_id, doc)
                    (result,) = self._answered(routed, think, [asked], asked["limit"], asked["temperature"])
                    said.append(result.text)
                    visuals, text, ended, said, info = to_text(
                        doc, previous_output=said, round_idx=len(said), previous_round_info=info
                    )
                    said = list(said)
                out.append(said)
        return out

    def _request(self, routed: Any, think: Any, request: Instance) -> dict[str, Any]:
        _, to_messages, settings, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        messages = _own_words(routed, think, doc) or [_chat(m) for m in to_messages(doc)]
        return self._asked(messages, settings, task, doc_id, doc)

    def _asked(
        self, messages: list[dict[str, Any]], settings: dict[str, Any], task: str, doc_id: Any, doc: Any
    ) -> dict[str, Any]:
        is_direct = (self.recipe.think or {}).get("name") == "direct"
        return {
            "messages": messages,
            # The harness's limit is meant for bare answers (often 16); a recipe that thinks has its own.
            "limit": int(settings.get("max_new_tokens", 512)) if is_direct else None,
            "temperature": float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0,
            "until": [u for u in _listed(settings.get("until")) if u],
            "task": task,
            "doc_id": doc_id,
            "id": str(doc.get("id", doc_id) if isinstance(doc, dict) else doc_id),
            "text": " ".join(b.get("text", "") for m in messages for b in m["content"]),
        }

    def _result(self, asked: dict[str, Any], answer: Any) -> GenerationResult:
        text = answer.text
        for stop in asked["until"]:
            text = text.split(stop)[0]
        shown = self._extracted(asked["text"], text) if self.extract else text
        last = self.loaded.processor.tokenizer(answer.hops[-1], add_special_tokens=False)["input_ids"]
        thought = max(answer.ar_steps - len(last), 0) if len(answer.hops) > 1 else 0
        counts = TokenCounts(input_tokens=answer.prompt_tokens, output_tokens=answer.ar_steps, reasoning_tokens=thought)
        if self.traces is not None:
            self._note(asked, answer, counts, text)
        return GenerationResult(text=shown, token_counts=counts)

    def _extracted(self, asked: str, text: str) -> str:
        """The letter or the yes or no that a completion gives, where that is asked; else the completion."""
        if _YES_NO_ASKED.search(asked):
            return _parse.yes_no(text) or text
        if _LETTER_ASKED.search(asked):
            return _parse.letter(text, "ABCDEFGH") or text
        return text

    def _note(self, asked: dict[str, Any], answer: Any, counts: TokenCounts, text: str) -> None:
        line = {
            "task": asked["task"],
            "doc_id": asked["doc_id"],
            "id": asked["id"],
            "recipe": self.recipe.name,
            "text": text,
            "prompt_tokens": counts.input_tokens,
            "output_tokens": counts.output_tokens,
            "reasoning_tokens": counts.reasoning_tokens,
            "ar_steps": answer.ar_steps,
            "hops": len(answer.hops),
            "kv_bytes": cost.estimate_kv_bytes(answer.trace),
            "flops": cost.estimate_flops(answer.trace).total,
            "keep": cost.keep_shares(answer.trace),
        }
        assert self.traces is not None
        with self.traces.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")

    # ------------------------------------------------------------------ likelihood

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation behind its question, and whether greedy decoding would write it."""
        out = []
        for request in requests:
            context, target, to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            continuation = target(doc) if callable(target) else target
            content = [*map(_image, to_visual(doc)), {"type": "text", "text": context}]
            out.append(self._scored([{"role": "user", "content": content}], str(continuation)))
        return out

    def _scored(self, messages: list[dict[str, Any]], continuation: str) -> tuple[float, bool]:
        model, processor = self.loaded, self.loaded.processor
        batch = prepare(model, processor, [messages])
        tail = processor.tokenizer(continuation, add_special_tokens=False, return_tensors="pt")["input_ids"]
        tail = tail.to(batch["input_ids"].device)
        width = tail.shape[1]
        batch = {key: _longer(key, value, tail) for key, value in batch.items()}
        logits = model(**batch).logits[0, -width - 1 : -1].float()
        logs = logits.log_softmax(-1)
        ids = batch["input_ids"][0, -width:]
        total = float(logs.gather(1, ids[:, None]).sum())
        return total, bool((logits.argmax(-1) == ids).all())


def _own_words(routed: Any, think: Any, doc: Any) -> list[dict[str, Any]] | None:
    """An item of a generated world in the short words of the small models, for a model that knows no others.

    The harness asks in plain English, of which a closed vocabulary makes unknown words; `mmroute eval` asks so too.
    """
    if not isinstance(doc, dict) or doc.get("schema") != SCHEMA:
        return None
    task = hub.load("tasks", doc["task"])
    if not isinstance(task, Generated) or not items.is_beyond_words(routed, doc["question"]):
        return None
    return items.messages(routed, task, lmms_sample(doc), think)


def _longer(key: str, value: Any, tail: torch.Tensor) -> Any:
    """A prompt's tensor with the continuation's columns behind it."""
    if key == "input_ids":
        return torch.cat([value, tail], dim=1)
    if key == "attention_mask":
        return torch.cat([value, torch.ones_like(tail)], dim=1)
    if key in ("mm_token_type_ids", "token_type_ids"):
        return torch.cat([value, torch.zeros_like(tail)], dim=1)
    return value


def _chat(message: dict[str, Any]) -> dict[str, Any]:
    """lmms-eval's message as ours: it keeps pictures under `url`."""
    content = []
    for block in message["content"]:
        if block["type"] == "text":
            content.append({"type": "text", "text": block["text"]})
        elif block["type"] == "image":
            content.append(_image(block.get("url", block.get("image"))))
        else:
            raise ConfigError(f"mmroute reads text and images; the task shows a {block['type']}")
    return {"role": message["role"], "content": content}


def _image(image: Any) -> dict[str, Any]:
    return {"type": "image", "image": image}


def _listed(value: Any) -> Sequence[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
