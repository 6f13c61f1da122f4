"""Other people's data as `mmhop/1` samples: trees of MVoT, VoCoT's thoughts with boxes, written rationales.

| name | reads | hops |
|---|---|---|
| `mvot`, `mvot-dare` | MVoT's tree, see `_mvot`; the second does not trust labels | one per move, with its picture |
| `vocot` | VoCoT's JSON or JSONL with `images/` | a sentence each, boxes of `<coor> x1,y1,x2,y2 </coor>` |
| `m3cot`, `scienceqa` | the benchmark's files, see `hub/` | sentences of the rationale, merged to at most three |
| `onethinker` | the same | paragraphs of the reasoning trace, merged to at most four |
| `gqa` | the same | the full answer, as it is |

Source: VoCoT (arXiv 2405.16919); how rationales are cut: Vedas and IVT-LR (arXiv 2510.12603). Behaviour only.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from mmroute import hub
from mmroute.errors import ConfigError, InputError
from mmroute.tasks._mvot_import import from_mvot
from mmroute.tasks._pictures import open_image
from mmroute.tasks.base import Hop, Sample
from mmroute.tasks.hub._fields import choices as lettered
from mmroute.tasks.hub._fields import first, option_texts, pictures, split_options
from mmroute.tasks.hub._readers import JsonlWithImages

__all__ = ["IMPORTERS", "blank_line", "given", "import_samples", "sentence"]

_COOR = re.compile(r"<coor>\s*([^<]*?)\s*</coor>")
_ANSWER = re.compile(r"(?:the answer is|answer:)\s*(.+?)\.?\s*$", re.IGNORECASE | re.DOTALL)


def import_samples(folder: Path, source: str) -> Iterator[Sample]:
    """Samples of a foreign folder.

    Raises:
        ConfigError: no such source.
        InputError: the folder is not of that kind, or something in it is broken.
    """
    if source not in IMPORTERS:
        raise ConfigError(f"--from is one of {', '.join(IMPORTERS)} (given {source!r})")
    return IMPORTERS[source](Path(folder))


# ---------------------------------------------------------------------- rationales


def sentence(text: str, most: int = 3) -> list[str]:
    """A rationale cut at the ends of its sentences, neighbours merged evenly until there are at most `most` parts.

    Example:
        >>> sentence("One. Two. Three. Four.", most=2)
        ['One. Two.', 'Three. Four.']
    """
    parts = [part.strip() for part in text.replace("\n", " ").split(". ") if part.strip()]
    return _merged([part if part.endswith(".") else f"{part}." for part in parts], most, " ")


def blank_line(text: str, most: int = 4) -> list[str]:
    """A reasoning trace cut at blank lines, merged as `sentence` does."""
    return _merged([part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()], most, "\n\n")


def given(text: str) -> list[str]:
    """The text as it is: one hop, or none."""
    return [text.strip()] if text.strip() else []


def _merged(parts: list[str], most: int, glue: str) -> list[str]:
    count = min(most, len(parts))
    ends = [round(i * len(parts) / count) for i in range(count + 1)] if count else [0]
    return [glue.join(parts[a:b]) for a, b in pairwise(ends)]


def _with_hops(name: str, field: str, cut: Callable[[str], list[str]]) -> Callable[[Path], Iterator[Sample]]:
    """An importer of a public benchmark whose rows carry a rationale."""

    def read(folder: Path) -> Iterator[Sample]:
        task: Any = hub.load("tasks", name)
        splits = [split for split in task.card.splits if any(s.found(folder, split) for s in task.sources)]
        if not splits:
            wanted = task.wants(folder, next(iter(task.card.splits)))
            raise InputError(f"{folder}: nothing of {name} is there; it needs {wanted}")
        for split in splits:
            for sample in task.samples_in(folder, split):
                hops = [Hop(text) for text in cut(str(sample.meta.get(field) or ""))]
                yield dataclasses.replace(sample, hops=hops)

    return read


# ---------------------------------------------------------------------- VoCoT


def _vocot(folder: Path) -> Iterator[Sample]:
    files = [p for p in sorted(folder.glob("*.json*")) if p.suffix in (".json", ".jsonl")]
    if not files:
        raise InputError(f"{folder} holds no VoCoT data: no .json or .jsonl in it")
    for file in files:
        reader = JsonlWithImages(file.name, columns=("image",))
        for number, row in enumerate(reader.rows(folder, "")):
            try:
                yield _thought(row, f"{file.stem}-{number:06d}")
            except (InputError, KeyError, TypeError, ValueError) as error:
                raise InputError(f"{file}:{number + 1}: not as VoCoT writes it: {error}") from None


def _thought(row: dict[str, Any], name: str) -> Sample:
    question, thought = _turns(row)
    images = pictures(row, "image")
    hops = [_boxed(part, images) for part in sentence(thought, most=len(thought)) if part]
    told = _ANSWER.search(_COOR.sub("", thought))
    answer = str(row.get("answer") or (told[1] if told else "")).strip()
    asked, listed = split_options(question)
    options = lettered(listed or option_texts(row, "options", "choices"))
    index = next((i for i, c in enumerate(options) if answer.strip("().").upper() == c.label), -1)
    label = options[index].label if index >= 0 else answer
    if hops and told:
        hops = hops[:-1] or hops
    return Sample(
        id=f"vocot-{name}",
        task="vocot",
        split="train",
        group="",
        question=asked,
        images=images,
        prompt_images=list(range(len(images))),
        hops=hops,
        choices=options if index >= 0 else [],
        answer=label,
        answer_index=index,
        answer_text=f"The answer is {label}." if label else "",
        difficulty={},
        meta={"source": "vocot", "license": "see VoCoT"},
    )


def _turns(row: dict[str, Any]) -> tuple[str, str]:
    """The question and the thought, from columns of their own or from a conversation."""
    talk = row.get("conversation") or row.get("conversations")
    if talk:
        said = [str(turn.get("value", turn.get("content"))) for turn in talk]
        question, thought = said[0], said[1]
    else:
        question, thought = str(first(row, "question")), str(first(row, "thought", "rationale", "response"))
    return question.replace("<image>", "").strip(), thought.strip()


def _boxed(text: str, images: list[Any]) -> Hop:
    boxes = []
    for found in _COOR.findall(text):
        # Several boxes of one thing are divided by semicolons.
        for part in found.split(";"):
            box = [float(x) for x in part.split(",")]
            if len(box) != 4:
                raise InputError(f"a box has four numbers, given {part!r}")
            if max(box) > 1:  # pixels
                width, height = open_image(images[0]).size
                box = [box[0] / width, box[1] / height, box[2] / width, box[3] / height]
            boxes.append([min(max(x, 0.0), 1.0) for x in box])
    plain = re.sub(r"\s+([.,])", r"\1", " ".join(_COOR.sub("", text).split()))
    return Hop(plain, boxes=boxes, box_image=0 if boxes else -1)


IMPORTERS: dict[str, Callable[[Path], Iterator[Sample]]] = {
    "mvot": from_mvot,
    "mvot-dare": lambda folder: from_mvot(folder, trusted=False),
    "vocot": _vocot,
    "m3cot": _with_hops("m3cot", "rationale", sentence),
    "scienceqa": _with_hops("scienceqa", "rationale", sentence),
    "gqa": _with_hops("gqa", "full_answer", given),
    "onethinker": _with_hops("onethinker", "rationale", blank_line),
}
