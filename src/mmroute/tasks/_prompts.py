"""Questions in plain English, for models with a tokenizer of their own: one set of parts, several wordings.

| wording | what it is |
|---|---|
| `sentence` | all parts in their natural order; the default |
| `para` | one of five wordings of the same parts, by the item's seed: is a model's answer a matter of phrasing? |
| `mvot-like` | MVoT's order: rules, moves, the whole list, then the picture and `Response:` |
| a file | any template with `{image}`, `{question}` or the single parts: for checkpoints trained on other wordings |

Source: the order of `mvot-like` is that of MVoT (arXiv 2501.07542); all wording is our own.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mmroute.errors import ConfigError

__all__ = ["NUM_PARAPHRASES", "WORDINGS", "Question", "blocks", "mvot_like", "read_template"]

WORDINGS = ("sentence", "para", "mvot-like")
NUM_PARAPHRASES = 5
_IMAGE = "{image}"


@dataclass(frozen=True)
class Question:
    """What an item asks, in parts; a part may be empty."""

    scene: str
    """What the picture shows."""
    rules: str
    given: str
    """The list of moves, where there is one."""
    asked: str
    options: tuple[str, ...]
    """Lines such as `A. Plate A`."""
    instruction: str
    """How to answer."""

    def plain(self) -> str:
        """All parts in their natural order."""
        told = " ".join(part for part in (self.scene, self.rules, self.given, self.asked) if part)
        if not self.options:
            return f"{told} {self.instruction}"
        return "\n".join([told, *self.options, self.instruction])

    def reworded(self, which: int) -> str:
        """One of `NUM_PARAPHRASES` wordings of the same question; 0 is `plain`."""
        if not which:
            return self.plain()
        lead, order, close = _FRAMES[which]
        told = [lead, *(getattr(self, part) for part in order)]
        return "\n".join([" ".join(part for part in told if part), *self.options, close or self.instruction])


_FRAMES: dict[int, tuple[str, tuple[str, ...], str]] = {
    1: ("", ("asked", "scene", "rules", "given"), ""),
    2: ("Look at the picture carefully.", ("scene", "given", "rules", "asked"), ""),
    3: ("Here is a small puzzle.", ("rules", "scene", "asked", "given"), "Give the answer alone."),
    4: (
        "Please work this out from the picture.",
        ("given", "asked", "rules", "scene"),
        "Reply with your final answer.",
    ),
}
"""Number -> opening words, order of the parts, closing instruction (empty: the question's own)."""


_MVOT = {
    "maze": (
        "Task: Maze\nFind where a series of moves ends. The moves are carried out one by one from the start marked in "
        "the picture; choose the letter of the cell that is reached.\n{moves}\n",
        "Initial maze: ",
    ),
    "frozenlake": (
        "Task: Frozen lake\nSay how a series of moves ends. The figure carries them out one by one on a lake that is "
        "not slippery, and stops in a hole or at the gift.\n{moves}\nOptions:\nA. The gift is reached.\n"
        "B. The figure falls into a hole.\nC. The figure is safe and the gift is not reached.\n",
        "Initial State: ",
    ),
    "minibehavior": (
        "Task: Mini behavior\nSay how a series of actions ends. The agent carries them out one by one; the printer is "
        "to be brought to the table and switched on.\n{moves} Pick takes the printer from a neighbouring cell, drop "
        "puts it down, toggle switches it on.\nOptions:\nA. The printer is on at the table.\n"
        "B. A drop fails.\nC. A pick fails.\nD. A step is missing.\n",
        "Initial State: ",
    ),
}
_MOVES = "Moves: up is one row towards the top, down one towards the bottom, left and right one column to that side."


def mvot_like(task: str, actions: list[str]) -> tuple[str, str]:
    """The text before and after the picture in MVoT's order.

    Args:
        task: name of the world.
        actions: everything that is listed, as phrases such as `Go right.`

    Raises:
        ConfigError: a world without such a wording.
    """
    if task not in _MVOT:
        raise ConfigError(f"{task} has no mvot-like wording; only {', '.join(_MVOT)} have (take sentence or para)")
    head, opening = _MVOT[task]
    return f"{head.format(moves=_MOVES)}Action sequence: {' '.join(actions)}\n{opening}", "\nResponse: "


def read_template(path: str) -> str:
    """A prompt template from a file.

    Raises:
        ConfigError: no such file, or one without a place for the picture.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"prompt: one of {', '.join(WORDINGS)} or a template file; {path!r}: {reason}") from None
    if text.count(_IMAGE) != 1:
        raise ConfigError(f"{path}: a template has {_IMAGE} exactly once, where the picture stands")
    return text


def blocks(template: str, image: dict[str, Any], question: Question) -> list[dict[str, Any]]:
    """Chat blocks of a template with `{image}` once, and `{question}` or names of single parts where they belong."""
    known = {"question": question.plain(), **{f.name: getattr(question, f.name) for f in fields(question)}}
    known["options"] = "\n".join(question.options)
    sides = []
    for side in template.split(_IMAGE):
        # Not str.format: a template for a model may hold braces of its own.
        for name, text in known.items():
            side = side.replace(f"{{{name}}}", text)
        sides.append(side)
    before, after = ([{"type": "text", "text": side}] if side else [] for side in sides)
    return [*before, image, *after]
