"""OneThinker's training data: reasoning traces over pictures for many kinds of question.

Source: OneThinker (arXiv 2512.03043), supervised fine-tuning data; problem, options and `<think>..</think><answer>..`.
Deviates: items about video and segmentation have no picture to open here and are left out.
"""

import re
from typing import ClassVar

from mmroute.tasks.base import Card, Sample
from mmroute.tasks.hub._fields import first, pictures, split_options
from mmroute.tasks.hub._public import Public
from mmroute.tasks.hub._readers import HubRows, JsonlWithImages, Row
from mmroute.tasks.hub._rules import letter_or_text

__all__ = ["OneThinker"]


_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


class OneThinker(Public):
    """A letter or a value; `meta` has the reasoning trace, for `mmroute data import --from onethinker`."""

    name = "onethinker"
    card: ClassVar[Card] = Card(
        ("OneThink/OneThinker-train-data",), {"train": 340_000}, "Apache-2.0", "generate", "accuracy", 0.0
    )
    sources = (
        JsonlWithImages("onethinker_sft_image.json", images=".", columns=("path",)),
        HubRows("OneThink/OneThinker-train-data"),
    )
    prompts: ClassVar = {
        "plain": lambda s: "\n".join([s.question, *(f"{c.label}. {c.text}" for c in s.choices)]),
    }
    scorers: ClassVar = {"default": letter_or_text, "value": letter_or_text}
    categories = ("problem_type",)

    def expand(self, row: Row, split: str, number: int) -> list[Sample]:
        is_image = str(row.get("data_type", "image")) == "image" and row.get("problem_type") != "segmentation"
        return [self.sample(row, split, number)] if is_image else []

    def sample(self, row: Row, split: str, number: int) -> Sample:
        trace = str(row.get("solution") or row.get("process") or "")
        told = _ANSWER.search(trace)
        thought = _THINK.search(str(row.get("process") or trace))
        question, options = split_options(first(row, "problem", "question").replace("<image>", "").strip())
        listed = row.get("options")
        if isinstance(listed, list) and listed:
            options = [re.sub(r"^\(?[A-Z][.):]\s*", "", str(text)) for text in listed]
        return self.make(
            split,
            number,
            question=question,
            images=pictures(row, "path", "image", "images"),
            options=options,
            answer=told[1].strip() if told else first(row, "answer"),
            rationale=thought[1].strip() if thought else "",
            problem_type=first(row, "problem_type", default="unknown"),
        )
