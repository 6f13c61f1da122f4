"""MATH-Vision: problems of mathematics competitions with their figures.

Source: MATH-Vision (arXiv 2402.14804). `options` may be letters only, when the figure holds the options.
"""

from typing import ClassVar

from mmroute.tasks.base import Card, Sample
from mmroute.tasks.hub._fields import first, option_texts, pictures
from mmroute.tasks.hub._public import Public
from mmroute.tasks.hub._readers import HubRows, Row, Tsv
from mmroute.tasks.hub._rules import letter_or_text

__all__ = ["MathVision"]


def _prompt(sample: Sample) -> str:
    lines = [f"({c.label}) {c.text}" for c in sample.choices]
    return "\n".join([sample.question, *lines, "Reason step by step and put the answer into \\boxed{}."])


class MathVision(Public):
    """A letter or a value, boxed; by level and subject."""

    name = "mathvision"
    card: ClassVar[Card] = Card(
        ("MathLLMs/MathVision",), {"test": 3040, "testmini": 304}, "MIT", "generate", "accuracy", 0.1
    )
    sources = (
        Tsv("MathVision", splits=("test",)),
        Tsv("MathVision_MINI", splits=("testmini",)),
        HubRows("MathLLMs/MathVision"),
    )
    prompts: ClassVar = {"boxed": _prompt}
    scorers: ClassVar = {"default": letter_or_text, "value": letter_or_text}
    categories = ("level", "subject")

    def sample(self, row: Row, split: str, number: int) -> Sample:
        return self.make(
            split,
            number,
            question=first(row, "question"),
            images=pictures(row, "decoded_image") or pictures(row, "image"),
            options=option_texts(row, "options", "choices"),
            answer=first(row, "answer"),
            level=str(first(row, "level", default="unknown")),
            subject=first(row, "subject", "category", default="unknown"),
        )
