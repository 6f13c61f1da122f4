"""The closed vocabulary of the small models, and the pieces that texts are made of.

Every style writes a coordinate as one word, `r2c1`: two words `r2 c1` are learnt more slowly.
"""

from dataclasses import dataclass

__all__ = [
    "BOS",
    "COLOURS",
    "EOS",
    "IMAGE",
    "MOVES",
    "PAD",
    "SHAPES",
    "SPECIAL",
    "UNK",
    "VISION_END",
    "VISION_START",
    "VOCABULARY",
    "Words",
    "board_text",
    "coordinate",
    "numbered",
    "position",
    "told",
]

BOS, EOS, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
VISION_START, IMAGE, VISION_END, VIDEO, UNK = (
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_end|>",
    "<|video_pad|>",
    "<unk>",
)
SPECIAL = (PAD, BOS, EOS, VISION_START, VISION_END, IMAGE, VIDEO, UNK)
"""Qwen's names, so that stock processors find them."""

MOVES = ("up", "left", "down", "right")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "diamond")
MAX_COORDINATE, MAX_STEP, SIZE = 16, 24, 384

_PLAIN = (
    *(".", ",", "?", ";", ":"),
    *("task:", "frozenlake", "maze", "arrows", "gridspatial", "minibehavior", "needle"),
    *("actions:", "k:", "cot:", "direct:", "probe:", "latent:", "layout:", "response:", "start", "answer:"),
    *MOVES,
    *("A", "B", "C", "D", "yes", "no"),
    *("ice", "hole", "goal", "free", "wall", "empty", "fog", "success", "hole_fall", "not_reached"),
    *COLOURS,
    *SHAPES,
    *("left_of", "right_of", "above", "below", "nearest", "between"),
    *(
        [
            "pick",
            "drop",
            "toggle",
            "printer",
            "table",
            "floor",
            "carrying",
            "none",
            "drop_error",
            "pickup_error",
            "missing_step",
            "target",
        ]
    ),
)
VOCABULARY: list[str] = [
    *SPECIAL,
    *(f"r{r}c{c}" for r in range(MAX_COORDINATE) for c in range(MAX_COORDINATE)),
    *(f"s{i}" for i in range(1, MAX_STEP + 1)),
    *_PLAIN,
]
_LATER = (*(str(i) for i in range(MAX_COORDINATE)), "same", "<rate>", "\n")
_SENTENCES = ("After", "moving", "I", "am", "at", "which", "is")
VOCABULARY += [*_LATER, *_SENTENCES]
"""Position = token id. The order is part of every trained checkpoint, and all `SIZE` words are taken."""


@dataclass(frozen=True)
class Words:
    """One training text; `supervised[i]` says whether response word i carries loss."""

    prompt: list[str]
    response: list[str]
    supervised: list[bool]


def coordinate(row: int, col: int) -> str:
    """The word of a place."""
    return f"r{row}c{col}"


def position(word: str) -> tuple[int, int]:
    """Row and column of a coordinate word.

    Example:
        >>> position("r12c3")
        (12, 3)
    """
    row, _, col = word[1:].partition("c")
    return int(row), int(col)


def numbered(actions: list[str], first: int = 1) -> list[str]:
    """Actions with their step words, as prompts and chains write them.

    Args:
        actions: in their order.
        first: number of the first one.

    Example:
        >>> numbered(["up", "left"])
        ['s1', 'up', 's2', 'left']
    """
    return [word for i, action in enumerate(actions, start=first) for word in (f"s{i}", action)]


def told(place: str, step: int | None = None, move: str = "", met: str = "") -> list[str]:
    """Where one is, as a full sentence.

    Args:
        place: coordinate word.
        step: number of the step that led there; None for the start.
        move: how.
        met: what is there.

    Example:
        >>> " ".join(told("r2c4", 3, "right", "ice"))
        'After s3 , moving right , I am at r2c4 , which is ice .'
    """
    how = [] if step is None else ["After", f"s{step}", ",", "moving", move, ","]
    return [*how, "I", "am", "at", place, *([",", "which", "is", met] if met else []), "."]


_SYMBOL = {"ice": ".", "free": ".", "empty": ".", "floor": ".", "hole": "O", "wall": "#", "start": "S", "goal": "G"} | {
    "up": "^",
    "left": "<",
    "down": "v",
    "right": ">",
}


def board_text(rows: list[list[list[str]]], current: tuple[int, int]) -> str:
    """A board drawn with letters, a line per row; the current cell stands in brackets.

    Args:
        rows: words of what each cell holds.
        current: row and column of the cell in brackets.

    Example:
        >>> print(board_text([[["ice"], ["hole"]], [["start"], ["goal"]]], (0, 1)))
         . [O]
         S  G
    """
    lines = []
    for r, row in enumerate(rows):
        drawn = ["".join(_SYMBOL.get(word, word[0]) for word in words) for words in row]
        lines.append("".join(f"[{x}]" if (r, c) == current else f" {x} " for c, x in enumerate(drawn)).rstrip())
    return "\n".join(lines)
