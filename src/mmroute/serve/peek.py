"""The rating at the head of a draft's stream: read, judged, and taken out before anything reaches the client.

A rating reads `^\\s?[0-9]{n}\\n`: one digit each, then a newline that guards against tokenizers which merge digits with
what follows. A tokenizer of whole words sets blanks between them, `7 3 \\n start`; then the one before the answer goes
too.

Source: PRP (arXiv 2606.30217), one or two rating tokens before any reasoning.
Deviates: ten levels and their form are ours.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from mmroute.gate._words import LEVELS

__all__ = ["Peek", "Rated", "expected"]

_DIGITS = "0123456789"
_FIELDS = ("content", "reasoning_content", "reasoning")
_MOST_CHARACTERS, _MOST_CHUNKS = 64, 8


@dataclass(frozen=True)
class Rated:
    """Predicted chances of success in [0, 1]."""

    draft: float
    target: float | None = None

    @property
    def score(self) -> float:
        """Larger: the target is worth more. With one rating, the draft's own doubt."""
        return 1 - self.draft if self.target is None else self.target - self.draft


def expected(digit: str, entry: dict[str, Any] | None) -> float:
    """A rating from one digit and, where the server sent it, the distribution it was drawn from.

    The expectation over the ten levels v_k = k / 9, renormalised; the digit alone where they hold less than half of
    the mass.
    """
    weights: dict[int, float] = {}
    for candidate in (entry or {}).get("top_logprobs") or ():
        text = str(candidate.get("token", "")).strip()
        if len(text) == 1 and text in "0123456789":
            weights[int(text)] = weights.get(int(text), 0.0) + math.exp(candidate["logprob"])
    mass = sum(weights.values())
    if mass < 0.5:
        return int(digit) / (LEVELS - 1)
    return sum(level * weight for level, weight in weights.items()) / mass / (LEVELS - 1)


@dataclass(frozen=True)
class _Form:
    """How much of a text is a rating with its tokens joined in one way."""

    end: int = 0
    """Characters at the head that are a rating, or the beginning of one."""
    is_whole: bool = False
    is_open: bool = True
    """Not whole, and nothing speaks against it."""
    borrowed: int = 0
    """Of these characters: the blank that the next token brings."""


def _read(text: str, num_ratings: int, joint: str, is_all: bool) -> _Form:
    at = known = int(text[:1].isspace())
    for number, kind in enumerate([_DIGITS] * num_ratings + ["\n"]):
        for fits in ([joint] if joint and number else []) + [kind]:
            if at == len(text):
                return _Form(known)
            if text[at] not in fits:
                return _Form(known, is_open=False)
            at += 1
        known = at
    if joint and at == len(text) and not is_all:
        return _Form(known)
    borrowed = int(bool(joint) and text[at : at + 1] == joint)
    return _Form(known + borrowed, True, False, borrowed)


@dataclass
class Peek:
    """An incremental machine: feed it chunks until it says `rated` or `unrated`; nothing leaks before.

    What it held back comes out of `held` with the rating, or the part of one, taken off.
    """

    num_ratings: int
    state: Literal["open", "rated", "unrated"] = "open"
    text: str = ""
    tokens: int = 0
    """Of the rating; taken out of `usage`."""
    _form: _Form = _Form()
    _field: str = ""
    _chunks: list[dict[str, Any]] = field(default_factory=list)
    _entries: list[dict[str, Any]] = field(default_factory=list)

    def feed(self, chunk: dict[str, Any]) -> str:
        """Looks at one more chunk; returns the state."""
        self._chunks.append(chunk)
        ended = False
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            for name in _FIELDS:
                if delta.get(name):
                    self._field = self._field or name
                    # Text of another field behind the beginning of a rating: no rating can be whole any more.
                    self.text += delta[name] if name == self._field else "\0"
            ended = ended or choice.get("finish_reason") is not None or bool(delta.get("tool_calls"))
            self._entries += (choice.get("logprobs") or {}).get("content") or ()
        enough = ended or len(self._chunks) >= _MOST_CHUNKS or len(self.text) >= _MOST_CHARACTERS
        forms = [_read(self.text, self.num_ratings, joint, enough) for joint in ("", " ")]
        whole = [form for form in forms if form.is_whole]
        if whole:
            self.state, self._form = "rated", whole[0]
        elif enough or not any(form.is_open for form in forms):
            self.state = "unrated"
            self._form = max(forms, key=lambda form: form.end)
        return self.state

    @property
    def rated(self) -> Rated:
        assert self.state == "rated"
        digits = [c for c in self.text[: self._form.end] if c in _DIGITS]
        spoken = [e for e in self._entries if str(e.get("token", "")).strip() in tuple(_DIGITS)]
        by_token = spoken[: len(digits)] if len(spoken) >= len(digits) else [None] * len(digits)
        if any(e is not None and e["token"].strip() != d for d, e in zip(digits, by_token, strict=True)):
            by_token = [None] * len(digits)  # a server that reports other tokens than it writes
        values = [expected(digit, entry) for digit, entry in zip(digits, by_token, strict=True)]
        return Rated(*values)

    def held(self) -> list[dict[str, Any]]:
        """The chunks seen so far as the client may see them."""
        cut = self._form.end
        self.tokens = self._count()
        entries, out = self.tokens, []
        for chunk in self._chunks:
            empty = bool(chunk.get("choices"))
            for choice in chunk.get("choices") or ():
                delta = choice.get("delta") or {}
                if cut and delta.get(self._field):
                    taken = min(cut, len(delta[self._field]))
                    delta[self._field], cut = delta[self._field][taken:], cut - taken
                content = (choice.get("logprobs") or {}).get("content")
                if content and entries:
                    taken = min(entries, len(content))
                    choice["logprobs"]["content"], entries = content[taken:], entries - taken
                says = any(delta.get(name) for name in delta)
                empty = empty and not says and choice.get("finish_reason") is None
            if not empty or chunk.get("usage"):
                out.append(chunk)
        self._chunks = []
        return out

    def _count(self) -> int:
        """Tokens that wrote the rating; one for each digit and the newline where the server does not say."""
        own = self.text[: self._form.end - self._form.borrowed]
        if not self._entries:
            return sum(not c.isspace() or c == "\n" for c in own)
        count = at = 0
        for entry in self._entries:
            if at >= len(own):
                break
            at += len(entry.get("token", ""))
            count += 1
        return count
