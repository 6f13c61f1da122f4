"""How a draft behind HTTP is asked for its rating: at the head of the stream that may become the answer, or by a call.

Source: PRP (arXiv 2606.30217), one or two rating tokens before any reasoning.
Deviates: how a rating travels over a chat API is ours: the template's switch `mmroute_rating`, or a continued turn.
"""

import re
from typing import Any

import numpy as np

from mmroute.errors import ConfigError
from mmroute.gate._manifest import Manifest, folder_of
from mmroute.gate._words import PREFIX, SWITCH
from mmroute.gate.base import Rating
from mmroute.serve.peek import Rated, expected
from mmroute.serve.schema import Asked
from mmroute.serve.settings import Settings

__all__ = ["call_body", "manifest", "must_call", "peek_body", "rating", "read_call", "with_usage"]

TOP_LOGPROBS = 20  # vLLM's cap; ten levels fit
_SHAPES_OUTPUT = (
    "response_format",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "grammar",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "continue_final_message",
    "echo",
    "prompt_logprobs",
)


def must_call(asked: Asked) -> bool:
    """Whether the head of the answer's own stream cannot hold a rating: the request shapes what may be written."""
    body = asked.body
    if (body.get("n") or 1) > 1 or any(body.get(name) for name in _SHAPES_OUTPUT):
        return True
    if body.get("tool_choice") not in (None, "auto", "none"):
        return True
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    return any(isinstance(s, str) and set(s) <= set("0123456789\n \t") for s in stops)


def _asking(body: dict[str, Any], settings: Settings) -> dict[str, Any]:
    out = {**body}
    if settings.rating_prefix == "template":
        out["chat_template_kwargs"] = {**(body.get("chat_template_kwargs") or {}), SWITCH: True}
    else:
        out["messages"] = [*body["messages"], {"role": "assistant", "content": PREFIX}]
        out.update(add_generation_prompt=False, continue_final_message=True)
    if settings.peek_logprobs:
        out.update(logprobs=True, top_logprobs=TOP_LOGPROBS)
    return out


def peek_body(asked: Asked, settings: Settings) -> dict[str, Any]:
    """The request to the draft whose first tokens are the rating; token limits make room for them."""
    out = _asking(asked.body, settings)
    for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
        if isinstance(out.get(name), int):
            out[name] += settings.num_ratings + 1
    return with_usage({**out, "stream": True})


def with_usage(body: dict[str, Any]) -> dict[str, Any]:
    """Usage is always asked for; who did not want it does not see it."""
    return {**body, "stream_options": {**(body.get("stream_options") or {}), "include_usage": True}}


def call_body(asked: Asked, settings: Settings) -> dict[str, Any]:
    """The request that asks for nothing but the rating, greedily; what would shape the output is taken out."""
    dropped = (
        *_SHAPES_OUTPUT,
        "stop",
        "n",
        "tools",
        "tool_choice",
        "min_tokens",
        "stream_options",
        "max_completion_tokens",
    )
    kept = {k: v for k, v in asked.body.items() if k not in dropped}
    return _asking({**kept, "max_tokens": settings.num_ratings, "temperature": 0, "stream": False}, settings)


def read_call(answer: dict[str, Any], num_ratings: int) -> Rated | None:
    """The rating in the answer to `call_body`; None where there is none."""
    choice = (answer.get("choices") or [{}])[0]
    message = choice.get("message") or {}
    text = next((message[k] for k in ("content", "reasoning_content", "reasoning") if message.get(k)), "").strip()
    found = re.match(f"[0-9](?: ?[0-9]){{{num_ratings - 1}}}", text)
    if found is None:
        return None
    digits = found[0].replace(" ", "")
    entries = (choice.get("logprobs") or {}).get("content") or []
    spoken = [e for e in entries if str(e.get("token", "")).strip() in tuple("0123456789")]
    fits = [e["token"].strip() for e in spoken[:num_ratings]] == list(digits)
    return Rated(*(expected(d, spoken[i] if fits else None) for i, d in enumerate(digits)))


def manifest(settings: Settings) -> Manifest | None:
    """What the draft was trained and calibrated as, where the settings name it.

    Raises:
        CheckpointMismatch: no such artifact.
        ConfigError: it reads a draft of this process and this one is behind HTTP, or it has another number of ratings.
    """
    if settings.rater is None:
        return None
    found = Manifest.read(folder_of(settings.rater))
    if settings.draft.url is None:
        return found
    if not found.is_written:
        raise ConfigError(
            f"serve.rater: {settings.rater} reads the session of a draft in this process; a draft behind HTTP writes "
            "its ratings: train it with `mmroute train prp --set gate.form=tokens`"
        )
    ratings = found.config.get("num_ratings", 2)
    if ratings != settings.num_ratings:
        raise ConfigError(f"serve.num_ratings is {settings.num_ratings}, and {settings.rater} was trained on {ratings}")
    return found


def rating(rated: Rated | None, settings: Settings, known: Manifest | None = None) -> Rating | None:
    """As a policy sees it; costs in units of the target's.

    Args:
        rated: what was read.
        settings: the prices of an answer token say what costs are, where both are known.
        known: calibrates what was read, and knows the costs.
    """
    if rated is None:
        return None
    ours, theirs = settings.draft.price_out, settings.target.price_out
    ratio = ours / theirs if ours is not None and theirs else 0.0
    if known is None:
        return Rating(rated.score, rated.draft, rated.target, draft_cost=ratio, target_cost=1.0)
    both = known.calibrated([np.array([r]) for r in (rated.draft, rated.target) if r is not None])
    costs = (ratio, 1.0) if ratio else known.facts.get("costs", (0.0, 1.0))
    draft, *target = (float(r[0]) for r in both)
    return Rating(float(known.score(both)[0]), draft, target[0] if target else None, *costs)
