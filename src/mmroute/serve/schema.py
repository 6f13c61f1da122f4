"""What a chat request, an answer in pieces and an error look like: OpenAI's shapes, checked where routing needs it.

Unknown fields go on untouched; only `mmroute` is taken out.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mmroute.errors import MmrouteError
from mmroute.serve.settings import Limits

__all__ = ["DONE", "ApiError", "Asked", "Overrides", "assemble", "error_body", "parse"]

DONE = b"[DONE]"
Route = Literal["draft", "target"]
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_DIALS = {"b": "budget", "t": "threshold", "l": "weight", "": "threshold"}
_AUTO = re.compile(r"auto|prp")
_DIAL = re.compile(r"(?:auto|prp)-([btl])(\d*\.?\d+)|router-prp-()(\d*\.?\d+)")


class ApiError(MmrouteError):
    """What goes to the client as `{"error": {...}}`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        body: bytes | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after
        self.body = body
        """An upstream's own envelope, passed through."""

    @property
    def payload(self) -> bytes:
        if self.body is not None:
            return self.body
        kind = _KINDS.get(self.status, "rate_limit_error" if self.status == 429 else "")
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return json.dumps(error_body(str(self), kind, self.param, self.code)).encode()


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Overrides:
    """What one request says about its own routing."""

    budget: float | None = None
    threshold: float | None = None
    weight: float | None = None
    """Success that one unit of cost must buy; a model's name alone can set it."""
    force: Route | None = None
    debug: bool = False


@dataclass(frozen=True)
class Asked:
    """A checked request."""

    body: dict[str, Any]
    """As the client wrote it, without `mmroute`."""
    model: str
    over: Overrides
    images: list[dict[str, Any]] = field(default_factory=list)
    """The `image_url` objects of all parts, in order; altered in place where an address is fetched."""

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def wants_usage(self) -> bool:
        return bool((self.body.get("stream_options") or {}).get("include_usage"))

    @property
    def characters(self) -> int:
        return sum(len(text) for text in _texts(self.body["messages"]))


def parse(raw: bytes, limits: Limits, served: Iterable[str], headers: dict[str, str] | None = None) -> Asked:
    """A request body, checked as far as routing depends on it.

    Args:
        served: real model names that may be asked for.
        headers: `x-mmroute-*`; what the body says about the same thing wins.

    Raises:
        ApiError: 400 for what is no chat request, 404 for a model nobody serves.
    """
    try:
        body = json.loads(raw, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a JSON object, given {type(body).__name__}")
    _check_depth(body, limits.json_depth)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages is a list of at least one message", param="messages")
    if len(messages) > limits.messages:
        raise ApiError(400, f"{len(messages)} messages given, at most {limits.messages} are read", param="messages")
    if not isinstance(body.get("stream", False), bool | None):
        raise ApiError(400, f"stream is true or false, given {body['stream']!r}", param="stream")
    _check_options(body)
    images = _images(messages)
    if len(images) > limits.images:
        raise ApiError(400, f"{len(images)} images given, at most {limits.images} are taken", param="messages")
    try:
        "".join(_texts(messages)).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "messages hold half a character, a surrogate without its other", param="messages") from None
    model = body.get("model")
    if not isinstance(model, str):
        raise ApiError(400, "model is a name; `auto` lets the gateway choose", param="model")
    over = _overrides({**_from_headers(headers or {}), **_object(body.pop("mmroute", None))})
    if model in ("draft", "target") or model in set(served):
        return Asked(body, model, over, images)
    dial = _DIAL.fullmatch(model)
    if dial is not None:
        named = {_DIALS[dial[1] or ""]: float(dial[2] or dial[4])}
        if over.budget is None and over.threshold is None:
            over = replace(over, **_checked(named))
    elif not _AUTO.fullmatch(model):
        known = ", ".join(["auto", "draft", "target", *served])
        raise ApiError(404, f"no model {model!r}; served: {known}", param="model", code="model_not_found")
    return Asked(body, "auto", over, images)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check_options(body: dict[str, Any]) -> None:
    """What routing or a model of this process reads is of its kind; everything else is the server's to judge."""
    for name in ("n", "max_tokens", "max_completion_tokens", "min_tokens", "seed"):
        value = body.get(name)
        if isinstance(value, float) and value.is_integer():
            body[name] = int(value)
        elif value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ApiError(400, f"{name} is a whole number, given {value!r}", param=name)
    for name in ("temperature", "top_p"):
        value = body.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not is_number:
            raise ApiError(400, f"{name} is a number, given {value!r}", param=name)
    for name in ("stream_options", "chat_template_kwargs"):
        if not isinstance(body.get(name), dict | None):
            raise ApiError(400, f"{name} is an object, given {body[name]!r}", param=name)
    stop = body.get("stop")
    stops = stop if isinstance(stop, list) else [] if stop is None else [stop]
    if not all(isinstance(each, str) for each in stops):
        raise ApiError(400, f"stop is a text or a list of texts, given {stop!r}", param="stop")


def _check_depth(value: Any, most: int) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > most:
            raise ApiError(400, f"the JSON is nested deeper than {most} levels", code="invalid_json")
        inner: list[Any] = []
        for each in level:
            inner += each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
        level = [each for each in inner if isinstance(each, dict | list)]


def _images(messages: list[Any]) -> list[dict[str, Any]]:
    found = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ApiError(400, f"{where} is an object with a role", param=where)
        content = message.get("content")
        if not isinstance(content, str | list | None):
            raise ApiError(400, f"{where}.content is text or a list of parts", param=f"{where}.content")
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise ApiError(400, f"{where}: a part is an object with a type", param=f"{where}.content")
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                raise ApiError(400, f"{where}: a text part has a text", param=f"{where}.content")
            if part["type"] == "image_url":
                image = part.get("image_url")
                if isinstance(image, str):  # some clients write the address itself
                    image = part["image_url"] = {"url": image}
                if not isinstance(image, dict) or not isinstance(image.get("url"), str):
                    raise ApiError(400, f"{where}: image_url is an object with a url", param=f"{where}.content")
                found.append(image)
    return found


def _texts(messages: list[dict[str, Any]]) -> Iterable[str]:
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            yield content
        else:
            yield from (part["text"] for part in content or () if part["type"] == "text")


def _object(value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ApiError(400, "mmroute is an object: budget, threshold, force, debug", param="mmroute")
    return value or {}


def _from_headers(headers: dict[str, str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in ("budget", "force", "debug"):
        text = headers.get(f"x-mmroute-{name}")
        if text is None:
            continue
        try:
            out[name] = text if name == "force" else {"true": True, "false": False}.get(text) or json.loads(text)
        except ValueError:
            raise ApiError(
                400, f"header x-mmroute-{name}: {text!r} cannot be read", param=f"x-mmroute-{name}"
            ) from None
    return out


def _overrides(given: dict[str, Any]) -> Overrides:
    unknown = set(given) - {"budget", "threshold", "force", "debug"}
    if unknown:
        raise ApiError(400, f"mmroute.{min(unknown)}: no such option; known: budget, threshold, force, debug")
    if given.get("force") not in (None, "draft", "target"):
        raise ApiError(400, f"mmroute.force is draft or target, given {given['force']!r}", param="mmroute.force")
    return Overrides(**_checked(given))


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    for name in ("budget", "threshold"):
        value = given.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ApiError(400, f"mmroute.{name} is a number, given {value!r}", param=f"mmroute.{name}")
    budget = given.get("budget")
    if budget is not None and not 0 <= budget <= 1:
        raise ApiError(400, f"mmroute.budget is a share in [0, 1], given {budget}", param="mmroute.budget")
    if not isinstance(given.get("debug", False), bool):
        raise ApiError(400, f"mmroute.debug is true or false, given {given['debug']!r}", param="mmroute.debug")
    return given


def assemble(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """One `chat.completion` from the chunks of a stream: texts joined, tool calls by index, the rest last wins."""
    out: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        out.update({k: v for k, v in chunk.items() if k not in ("choices", "object") and v is not None})
        for piece in chunk.get("choices") or ():
            choice = choices.setdefault(piece.get("index", 0), {"message": {"role": "assistant", "content": None}})
            _add_delta(choice["message"], piece.get("delta") or {})
            for key, value in piece.items():
                if key == "logprobs" and isinstance(value, dict):
                    kept = choice.setdefault("logprobs", {})
                    for name, entries in value.items():
                        kept[name] = [*(kept.get(name) or []), *entries] if isinstance(entries, list) else entries
                elif key not in ("index", "delta", "logprobs") and value is not None:
                    choice[key] = value
    listed = [{"index": i, "finish_reason": None, "logprobs": None, **c} for i, c in sorted(choices.items())]
    return {**out, "object": "chat.completion", "choices": listed}


def _add_delta(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for key, value in delta.items():
        if key == "tool_calls":
            calls = message.setdefault("tool_calls", [])
            for piece in value or ():
                at = piece.get("index", len(calls))
                while len(calls) <= at:
                    calls.append({"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
                function = piece.get("function") or {}
                calls[at].update({k: v for k, v in piece.items() if k not in ("index", "function") and v is not None})
                for name, text in function.items():
                    calls[at]["function"][name] = (calls[at]["function"].get(name) or "") + (text or "")
        elif isinstance(value, str) and key != "role":
            message[key] = (message.get(key) or "") + value
        elif value is not None:
            message[key] = value
