"""MM-Math: school geometry and algebra with figures, judged by the boxed answer of the solution.

Source: MM-MATH (arXiv 2404.05091).
"""

from typing import ClassVar

from mmroute.errors import InputError
from mmroute.tasks import _parse
from mmroute.tasks.base import Card, Sample
from mmroute.tasks.hub._fields import first, pictures
from mmroute.tasks.hub._public import Public
from mmroute.tasks.hub._readers import HubRows, JsonlWithImages, Row, Tsv
from mmroute.tasks.hub._rules import value

__all__ = ["MMMath"]


class MMMath(Public):
    """A boxed value; by difficulty, year and field."""

    name = "mmmath"
    card: ClassVar[Card] = Card(("THU-KEG/MM_Math",), {"test": 5929}, "Apache-2.0", "generate", "accuracy", 0.0)
    sources = (
        JsonlWithImages(
            "MM_Math.jsonl", images="MM_Math", columns=("file_name",), fetch="(MM_Math.zip of the data set)"
        ),
        Tsv("MM-Math"),
        HubRows("THU-KEG/MM_Math"),
    )
    prompts: ClassVar = {"boxed": lambda s: f"{s.question}\nReason step by step and put the answer into \\boxed{{}}."}
    scorers: ClassVar = {"default": value, "value": value}
    categories = ("difficulty", "year", "knowledge")

    def sample(self, row: Row, split: str, number: int) -> Sample:
        solution = str(row.get("solution") or "")
        answer = row.get("answer") or _parse.boxed(solution)
        if not answer:
            raise InputError("its solution has no \\boxed answer")
        return self.make(
            split,
            number,
            question=first(row, "question"),
            images=pictures(row, "image", "file_name")[:1],
            answer=answer,
            difficulty=str(first(row, "difficult", "difficulty", default="unknown")),
            year=str(first(row, "year", default="unknown")),
            knowledge=str(first(row, "knowledge", "category", default="unknown")),
        )
