"""SEED-Bench-2-Plus: charts, maps and web pages with much text in them.

Source: SEED-Bench-2-Plus (arXiv 2404.16790); `lmms` is lmms-eval's rule, the first character.
"""

from typing import ClassVar

from mmroute.tasks.base import Card, Sample
from mmroute.tasks.hub._fields import first, option_texts, pictures
from mmroute.tasks.hub._public import Public
from mmroute.tasks.hub._readers import HubRows, JsonlWithImages, Row, Tsv
from mmroute.tasks.hub._rules import lmms_first

__all__ = ["SEEDBench2Plus"]


class SEEDBench2Plus(Public):
    """A letter; by kind of picture."""

    name = "seedbench2plus"
    card: ClassVar[Card] = Card(
        ("AILab-CVC/SEED-Bench-2-plus", "doolayer/SEED-Bench-2-Plus"),
        {"test": 2277},
        "CC-BY-NC-4.0",
        "generate",
        "accuracy",
        0.25,
    )
    sources = (
        Tsv("SEEDBench2_Plus"),
        HubRows("doolayer/SEED-Bench-2-Plus"),
        JsonlWithImages("text_rich.jsonl", images="text_rich", columns=("data_id",)),
    )
    categories = ("kind",)
    scorers: ClassVar = {"lmms": lmms_first}

    def sample(self, row: Row, split: str, number: int) -> Sample:
        return self.make(
            split,
            number,
            question=first(row, "question"),
            images=pictures(row, "image", "data_id")[:1],
            options=option_texts(row),
            answer=first(row, "answer"),
            kind=first(row, "question_image_subtype", "question_image_type", "category", default="unknown"),
        )
