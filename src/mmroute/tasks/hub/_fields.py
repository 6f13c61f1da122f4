"""What the columns of benchmarks have in common, whatever they are called: options, answers, pictures.

Every source writes the same thing another way: options as columns A .. D, as a list, as the text of a list, inside the
question; an answer as a letter, an index, "(B)", the option's text. Here each of them becomes one thing.
"""

import ast
import re
import string
from collections.abc import Sequence
from typing import Any

from mmroute.errors import InputError
from mmroute.tasks.base import Choice

__all__ = ["answer_index", "choices", "first", "is_yes", "option_texts", "pictures", "split_options"]

_LETTERS = string.ascii_uppercase
_OPTION = re.compile(r"(?:^|\n|\s)\(?([A-Ha-h])[.):]\s+")


def first(row: dict[str, Any], *names: str, default: Any = None) -> Any:
    """The value of the first of these columns that the row has and that is not empty.

    Raises:
        InputError: none of them, and no default.
    """
    for name in names:
        value = row.get(name)
        if value is not None and not (isinstance(value, str) and not value.strip()):
            return value
    if default is not None:
        return default
    raise InputError(f"a row has none of the columns {', '.join(names)}; it has {', '.join(sorted(row))}")


def option_texts(row: dict[str, Any], *lists: str) -> list[str]:
    """The texts of the options: columns A, B .. or one column that holds a list or the text of one.

    Args:
        row: as a reader gave it.
        lists: names of columns that may hold the whole list.
    """
    for name in lists:
        value = row.get(name)
        if isinstance(value, str) and value.strip().startswith("["):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                raise InputError(f"column {name}: not the text of a list: {value!r}") from None
        if isinstance(value, list | tuple) and value:
            return [str(item) for item in value]
    texts = []
    for letter in _LETTERS:
        value = row.get(letter, row.get(f"choice_{letter.lower()}", row.get(f"choice_{letter}")))
        if value is None or not str(value).strip() or str(value) == "nan":
            break
        texts.append(str(value))
    return texts


def split_options(text: str) -> tuple[str, list[str]]:
    """A question and the options that are written behind it, `(a) .. (b) ..` or `A. ..` in lines.

    Example:
        >>> split_options("Which? (a) red (b) blue")
        ('Which?', ['red', 'blue'])
    """
    marks = list(_OPTION.finditer(text))
    begins = next((i for i, m in enumerate(marks) if m[1].upper() == "A"), None)
    if begins is None:
        return text.strip(), []
    run = [marks[begins]]
    for mark in marks[begins + 1 :]:
        if mark[1].upper() == _LETTERS[len(run)]:
            run.append(mark)
    ends = [*(m.start() for m in run[1:]), len(text)]
    options = [text[m.end() : end].strip(" \n,;") for m, end in zip(run, ends, strict=True)]
    question = re.sub(r"\s*(?:Options|Choices):?\s*$", "", text[: run[0].start()])
    return question.strip(), options


def choices(texts: Sequence[str]) -> list[Choice]:
    """Options as lettered choices."""
    return [Choice(letter, text) for letter, text in zip(_LETTERS, texts, strict=False)]


def answer_index(answer: Any, texts: Sequence[str]) -> int:
    """Which option is the answer: from an index, a letter, "(B)", or the option's text.

    Raises:
        InputError: it is none of the options.
    """
    if isinstance(answer, bool) or answer is None:
        raise InputError(f"an answer is an index, a letter or an option's text, given {answer!r}")
    if isinstance(answer, int) or (isinstance(answer, str) and answer.strip().isdigit() and answer not in texts):
        index = int(answer)
    else:
        letter = re.fullmatch(r"\(?([A-Za-z])[.):]?\)?", str(answer).strip())
        if letter:
            index = _LETTERS.index(letter[1].upper())
        else:
            plain = [text.strip().casefold() for text in texts]
            index = plain.index(str(answer).strip().casefold()) if str(answer).strip().casefold() in plain else -1
    if not 0 <= index < len(texts):
        raise InputError(f"the answer {answer!r} is none of the {len(texts)} options")
    return index


def is_yes(answer: Any) -> bool:
    """Whether a yes-or-no label says yes: 1, "1", True, "yes", "Yes.", "True".

    Raises:
        InputError: it says neither.
    """
    word = str(answer).strip().strip(".").casefold()
    if word in ("1", "yes", "true", "1.0"):
        return True
    if word in ("0", "no", "false", "0.0"):
        return False
    raise InputError(f"a yes-or-no label is 0, 1, yes or no, given {answer!r}")


def pictures(row: dict[str, Any], *names: str) -> list[Any]:
    """The pictures in these columns, in order; a column may be missing, empty or hold several."""
    out: list[Any] = []
    for name in names:
        value = row.get(name)
        out += value if isinstance(value, list) else [value] if value is not None and value != "" else []
    return out
