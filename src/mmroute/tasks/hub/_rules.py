"""Rules by which answers of public benchmarks are judged without a model as judge.

| rule | for |
|---|---|
| `exact` | words: normalised texts are equal (GQA) |
| `value` | mathematics: numbers within a tolerance, else equal expressions by sympy where it is installed |
| `lmms_exact`, `lmms_first` | lmms-eval's own way for a benchmark: the whole answer, or its first character |

Source: published evaluation scripts of the benchmarks and of lmms-eval 0.7, behaviour only.
Deviates: where a published script asks GPT to extract an answer, ours reads boxed values and answer phrases.
"""

import re

from mmroute.tasks import _parse
from mmroute.tasks._parse import Verdict
from mmroute.tasks.base import Sample

_MOST_WORDS = 12
"""A longer text is no value."""

__all__ = ["exact", "letter_or_text", "lmms_exact", "lmms_first", "same_value", "value"]


def exact(sample: Sample, completion: str) -> Verdict:
    """The short answer is the gold one: case, punctuation and articles do not count."""
    prediction = _parse.short_answer(completion)
    return Verdict(prediction is not None and prediction == _parse.normalise(sample.answer), prediction)


def lmms_exact(sample: Sample, completion: str) -> Verdict:
    """lmms-eval's exact match: the whole output, stripped, in lower case and without a final dot."""
    prediction = completion.strip().rstrip(".").casefold()
    return Verdict(prediction == sample.answer.casefold(), prediction or None)


def lmms_first(sample: Sample, completion: str) -> Verdict:
    """lmms-eval's rule of one letter: the first character of the output."""
    prediction = completion.strip()[:1].upper()
    return Verdict(bool(prediction) and prediction == sample.answer, prediction or None)


def letter_or_text(sample: Sample, completion: str) -> Verdict:
    """A letter where there are options, else the value."""
    if not sample.choices:
        return value(sample, completion)
    prediction = _parse.strict(_parse.boxed(completion) or completion, sample.choices)
    return Verdict(prediction is not None and prediction == sample.answer, prediction)


def value(sample: Sample, completion: str) -> Verdict:
    """The boxed answer, or the one behind the last answer phrase, has the gold value."""
    found = _parse.boxed(completion)
    if found is None:
        number = _parse.number(completion)
        found = f"{number:.12g}" if number is not None else _parse.stated(completion)
    if not found or len(found.split()) > _MOST_WORDS:
        return Verdict(False, None)
    precision = sample.meta.get("precision")
    return Verdict(same_value(found, sample.answer, None if precision is None else int(precision)), found)


def same_value(one: str, other: str, precision: int | None = None) -> bool:
    r"""Whether two answers mean the same: numbers, else simplified expressions, else normalised texts.

    Args:
        one: what was answered, plain or LaTeX.
        other: the gold answer.
        precision: decimals to which numbers are compared; None compares to a relative 1e-4.

    Example:
        >>> same_value(r"\frac{1}{2}", "0.5"), same_value("3", "4")
        (True, False)
    """
    a, b = _plain(one), _plain(other)
    if a == b:
        return True
    x, y = _number(a), _number(b)
    if x is not None and y is not None:
        if precision is not None:
            return round(x, precision) == round(y, precision)
        return abs(x - y) <= 1e-4 * max(abs(y), 1e-9)
    return _equal_expressions(a, b)


def _plain(text: str) -> str:
    """LaTeX as plain text, as far as answers go."""
    text = re.sub(r"\\(?:left|right|displaystyle|,|!|;|quad|text\{\s*\})", "", text.strip().strip("$"))
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\d?t?frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1)/(\2)", text)
    text = re.sub(r"\\sqrt\{([^{}]*)\}", r"sqrt(\1)", text)
    text = text.replace("\\cdot", "*").replace("\\times", "*").replace("\\pi", "pi").replace("\\%", "%")
    text = re.sub(r"\^\{?\\circ\}?|°", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return re.sub(r"\s+", "", text.rstrip(".")).casefold()


def _number(text: str) -> float | None:
    percent = text.endswith("%")
    match = re.fullmatch(r"\(?([-+]?[\d.]+)\)?(?:/\(?(\d+(?:\.\d+)?)\)?)?", text.rstrip("%"))
    if not match:
        return None
    try:
        top, below = float(match[1]), float(match[2]) if match[2] else 1.0
    except ValueError:
        return None
    return top / below / (100 if percent else 1) if below else None


def _equal_expressions(a: str, b: str) -> bool:
    # Only what looks like mathematics: sympy evaluates what it parses.
    if not all(re.fullmatch(r"[\da-z+\-*/^().]+", text) and len(text) <= 80 for text in (a, b)):
        return False
    if any(len(word) > 1 and word not in ("sqrt", "pi") for text in (a, b) for word in re.findall("[a-z]+", text)):
        return False
    if any(re.search(r"\*\*|\^\(?\d{3,}|\^.*\^", text) for text in (a, b)):  # powers of powers never end
        return False
    try:
        import sympy
        from sympy.parsing.sympy_parser import implicit_multiplication, parse_expr, standard_transformations
    except ImportError:
        return False
    rules = (*standard_transformations, implicit_multiplication)
    try:
        left, right = (parse_expr(text.replace("^", "**"), transformations=rules, evaluate=True) for text in (a, b))
        return bool(sympy.simplify(left - right) == 0)
    except (SyntaxError, TypeError, ValueError, AttributeError, ArithmeticError):
        return False
