"""What did the model answer, and is it right? Parsers and scoring rules over plain text.

Parsers are pure and total: any string in, a value or None ("unsure") out, never an exception. `strict` is the rule
used everywhere; the other rules exist to compare with published figures and are named in every result that uses them:
two rules are never mixed in one column.

Source: scoring rules of MVoT (arXiv 2501.07542), Vedas and M3CoT (arXiv 2405.16473) as described in public.
Deviates: `strict` is ours: it reads the completion only, and what it cannot read is wrong, not guessed.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mmroute.errors import ConfigError

if TYPE_CHECKING:
    from mmroute.tasks.base import Choice

__all__ = [
    "LETTERS",
    "SCORERS",
    "Reply",
    "Verdict",
    "boxed",
    "judge",
    "letter",
    "m3cot_official",
    "mvot",
    "normalise",
    "number",
    "short_answer",
    "stated",
    "strict",
    "vedas_lenient",
    "yes_no",
]

LETTERS = ("A", "B", "C", "D")

# What may stand between "answer is" and the answer itself: quotes, brackets, Markdown, "option", "the", \boxed{, $.
_FILLER = r"""(?:\s|["'`*_$(\[{:]|\\boxed|\\text|\boption\b|\bchoice\b|\bthe\b)*"""
_PHRASE = re.compile(r"\banswer\b\s*(?:\*{0,2}\s*:|\bis\b)" + _FILLER, re.IGNORECASE)
_WORD = re.compile(r"\w[\w'-]*")
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?!\w)|(?<![\w.])[-+]?\.\d+")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_EDGE = " \t\r\n.,;:!?*_\"'`()[]{}"


class Reply(NamedTuple):
    """What a rule may look at."""

    completion: str
    """What the model generated, nothing else."""
    gold: str
    """The right label; empty where the row has no answer."""
    choices: Sequence["Choice"]
    """What may be answered."""
    prompt: str = ""
    """The prompt's text; only `vedas_lenient` looks at it, which is its defect."""


class Verdict(NamedTuple):
    """What one rule says about one completion."""

    correct: bool | None
    """None where the rule does not apply to the row (MVoT's rows without an answer)."""
    prediction: str | None
    """What was read; None where nothing could be, which counts as wrong and as unparsed."""


def strict(text: str, choices: Sequence["Choice"]) -> str | None:
    """Which choice does a completion give as its answer?

    The last anchored phrase ("answer: X", "the answer is X") decides; without a label in it, a bare letter that ends
    the text; without any phrase, a text that is a lone label ("B", "(b) the red one", "Yes, it is"). A choice may be
    named by its label or by its text (`answer: hole_fall` for B).

    Args:
        text: the completion only. Never the prompt: an example in it would be read as the answer.
        choices: what may be answered; the result is one of their labels.
    """
    # A label wins over another choice's equal text, hence last.
    texts = {c.text.strip().casefold(): c.label for c in choices if c.text.strip()}
    return _read(text, texts | {c.label.casefold(): c.label for c in choices})


def _read(text: str, surface: Mapping[str, str]) -> str | None:
    """`strict` with the words to look for, in lower case, and the label each stands for."""
    phrases = list(_PHRASE.finditer(text))
    if phrases:
        found = _label_at(text, phrases[-1].end(), surface)
        if found is not None:
            return found
    single = "".join(re.escape(s) for s in surface if len(s) == 1)
    if single:
        # "in front of a" must not read as A: a bare letter counts in upper case only, unless it is the whole text.
        # "A or B", "not B" end in a letter and answer nothing.
        last = re.search(rf"(?<![\w'-])([{single.upper()}])[{re.escape(_EDGE)}]*\Z", text)
        if last and not re.search(r"(?:\b(?:or|and|not|nor|than|vs)|/)\W*\Z", text[: last.start()], re.IGNORECASE):
            return surface[last[1].casefold()]
    return None if phrases else _lone(text, surface)


def _label_at(text: str, start: int, surface: Mapping[str, str]) -> str | None:
    """The label that begins at `start`, longest first, with a word boundary behind it."""
    rest = text[start:]
    for word in sorted(surface, key=len, reverse=True):
        if not word or rest[: len(word)].casefold() != word or re.match(r"[\w-]", rest[len(word) :]):
            continue
        # "the answer is a dog" is not option A: a lower-case letter counts only where nothing follows in its sentence.
        if len(word) == 1 and rest[0].islower() and re.match(r"\s*[\w-]", rest[1:].split("\n")[0]):
            return None
        # "the answer is not B" never comes here; "the answer is B or C" does, and is no answer.
        also = re.match(r"[\s\])}'\"*_]*(?:,|/|or\b|and\b)\W*(\w+)", rest[len(word) :])
        if also and also[1].casefold() in surface and surface[also[1].casefold()] != surface[word]:
            return None
        return surface[word]
    return None


def _lone(text: str, surface: Mapping[str, str]) -> str | None:
    """The label a text opens with or consists of, if it names no other label."""
    bare = text.strip(_EDGE)
    if bare.casefold() in surface:
        return surface[bare.casefold()]
    opening = re.match(r"[\s(\[*_\"'`]*(\w[\w'-]*)(?:[*_\"'`]*[.,:;)\]]|[ \t]*\n)", text)
    if opening is None or opening[1].casefold() not in surface:
        return None
    label = surface[opening[1].casefold()]
    rest = {w for w in _WORD.findall(text[opening.end() :]) if len(w) > 1 or w.isupper()}
    others = {surface[w.casefold()] for w in rest if w.casefold() in surface} - {label}
    return None if others else label


def letter(text: str, labels: Sequence[str] = LETTERS) -> str | None:
    """Which option letter is answered? See `strict`.

    Example:
        >>> letter("Go right. The answer is B."), letter("A or B?")
        ('B', None)
    """
    return _read(text, {label.casefold(): label for label in labels})


def yes_no(text: str) -> str | None:
    """ "yes", "no", or None: which of the two is answered? See `strict`."""
    return _read(text, {"yes": "yes", "no": "no"})


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, braces balanced; None if there is none, it is empty or never closed.

    Example:
        >>> boxed(r"so $\boxed{\frac{1}{2}}$")
        '\\frac{1}{2}'
    """
    at = text.rfind(r"\boxed{")
    if at < 0:
        return None
    start = at + len(r"\boxed{")
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i].strip() or None
    return None


def number(text: str) -> float | None:
    """Which number is answered: boxed, else behind the last answer phrase, else the only one in the text.

    Thousands separators are read ("1,200"); units and words around it are ignored; a fraction "3/4" is divided.
    """
    inner = boxed(text)
    phrases = list(_PHRASE.finditer(text))
    if inner is not None:
        return _only_number(inner)
    if phrases:
        return _only_number(re.split(r"\n|[.!?](?:\s|$)", text[phrases[-1].end() :])[0])
    return _only_number(text)


def _only_number(text: str) -> float | None:
    fraction = re.fullmatch(r"\D*?([-+]?\d+)\s*/\s*(\d+)\D*", text, re.ASCII)
    if fraction:
        below = float(fraction[2])
        return float(fraction[1]) / below if below else None
    found = {float(m.replace(",", "")) for m in _NUMBER.findall(text) if m.isascii()}
    return found.pop() if len(found) == 1 else None


def stated(text: str) -> str | None:
    """What stands behind the last answer phrase, as it is, to the end of its sentence; a lone line is its own answer.

    Example:
        >>> stated("Thus the answer is x + 1. Done."), stated("two\nlines")
        ('x + 1', None)
    """
    phrases = list(_PHRASE.finditer(text))
    if phrases:
        text = re.split(r"\n|[.!?](?:\s|$)", text[phrases[-1].end() :])[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else None


def short_answer(text: str, max_words: int = 5) -> str | None:
    """Which word or short phrase is answered, normalised by `normalise`?

    Args:
        text: the completion.
        max_words: a longer text without an answer phrase is a sentence, not a short answer: None.
    """
    line = stated(text)
    answer = normalise(line) if line else ""
    return answer if answer and len(answer.split()) <= max_words else None


def normalise(text: str) -> str:
    """A short answer as it is compared: lower case, no punctuation, no articles, single spaces.

    Example:
        >>> normalise("The Red-ish  cube.")
        'red ish cube'
    """
    plain = re.sub(r"[^\w\s]|_", " ", text.casefold())
    return " ".join(_ARTICLES.sub(" ", plain).split())


def judge(scorer: str, reply: Reply) -> Verdict:
    """Is the reply right by the rule of that name?

    Raises:
        ConfigError: no rule of that name.
    """
    if scorer not in SCORERS:
        raise ConfigError(f"no scorer named {scorer!r}; one of {', '.join(SCORERS)}")
    return SCORERS[scorer](reply)


def _strict(reply: Reply) -> Verdict:
    prediction = strict(reply.completion, reply.choices)
    return Verdict(prediction is not None and prediction == reply.gold, prediction)


def mvot(reply: Reply) -> Verdict:
    """MVoT's rule: the first "The answer is X."; rows without a label are not scored."""
    found = re.search(r"The answer is (\w)\.", reply.completion)
    prediction = found[1] if found else None
    return Verdict(prediction == reply.gold if reply.gold else None, prediction)


def vedas_lenient(reply: Reply) -> Verdict:
    """Vedas' and IVT-LR's rule: right if the gold label follows *any* answer phrase of prompt and completion.

    Case does not count, so "the answer is a dog" is option A. Far too kind; only to compare with their figures.
    """
    seen = f"{reply.prompt}\n{reply.completion}"
    found = re.findall(r"(?:the answer is|answer:)[\s:(]*(\w+)", seen, re.IGNORECASE)
    prediction = found[-1] if found else None
    return Verdict(bool(reply.gold) and reply.gold.casefold() in {f.casefold() for f in found}, prediction)


def m3cot_official(reply: Reply) -> Verdict:
    """M3CoT's rule: the last "(X)", else the option whose text occurs, else the last letter that stands alone."""
    known = {c.label for c in reply.choices}
    bracketed = [x for x in re.findall(r"\(\s*(\w)\s*\)", reply.completion) if x in known]
    lowered = reply.completion.casefold()
    # An empty text occurs everywhere; the longest hit wins because "red" also occurs in "red cube".
    texts = [(len(c.text), c.label) for c in reply.choices if c.text and c.text.casefold() in lowered]
    alone = [x for x in re.findall(r"\b\w\b", reply.completion) if x in known]
    if bracketed:
        prediction: str | None = bracketed[-1]
    elif texts:
        prediction = max(texts)[1]
    else:
        prediction = alone[-1] if alone else None
    return Verdict(prediction is not None and prediction == reply.gold, prediction)


SCORERS: dict[str, Callable[[Reply], Verdict]] = {
    "strict": _strict,
    "mvot": mvot,
    "vedas_lenient": vedas_lenient,
    "m3cot_official": m3cot_official,
}
