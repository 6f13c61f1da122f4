"""SEED-Bench, images: nine kinds of understanding by multiple choice.

Source: SEED-Bench (arXiv 2307.16125), `SEED-Bench.json`; items about video are left out.
"""

from typing import ClassVar

from mmroute.tasks.base import Card, Sample
from mmroute.tasks.hub._fields import first, option_texts, pictures
from mmroute.tasks.hub._public import Public
from mmroute.tasks.hub._readers import HubRows, JsonlWithImages, Row, Tsv

__all__ = ["SEEDBench"]


class SEEDBench(Public):
    """A letter; by type of question."""

    name = "seedbench"
    card: ClassVar[Card] = Card(
        ("AILab-CVC/SEED-Bench", "lmms-lab/SEED-Bench"), {"test": 14_232}, "CC-BY-NC-4.0", "generate", "accuracy", 0.25
    )
    sources = (
        Tsv("SEEDBench_IMG"),
        HubRows("lmms-lab/SEED-Bench"),
        JsonlWithImages("SEED-Bench-image.jsonl", images="SEED-Bench-image", columns=("data_id",)),
    )
    categories = ("category",)

    def sample(self, row: Row, split: str, number: int) -> Sample:
        return self.make(
            split,
            number,
            question=first(row, "question"),
            images=pictures(row, "image", "data_id")[:1],
            options=option_texts(row),
            answer=first(row, "answer"),
            category=str(first(row, "question_type_id", "category", default="unknown")),
        )
