"""MMBench: twenty abilities by multiple choice; VoCoT's list uses the English development set.

Source: MMBench (arXiv 2307.06281).
Deviates: one pass; the benchmark's circular evaluation asks every question with its options turned and wants all right.
"""

from typing import ClassVar

from mmroute.tasks.base import Card, Sample
from mmroute.tasks.hub._fields import first, option_texts, pictures
from mmroute.tasks.hub._public import Public
from mmroute.tasks.hub._readers import HubRows, Row, Tsv

__all__ = ["MMBench"]


class MMBench(Public):
    """A letter; by category."""

    name = "mmbench"
    card: ClassVar[Card] = Card(
        ("lmms-lab/MMBench", "HuggingFaceM4/MMBench"), {"dev": 4329}, "Apache-2.0", "generate", "accuracy", 0.25
    )
    sources = (
        Tsv("MMBench_DEV_EN_legacy"),
        Tsv("MMBench_DEV_EN"),
        HubRows("lmms-lab/MMBench", configs=("en",)),
    )
    categories = ("category",)

    def sample(self, row: Row, split: str, number: int) -> Sample:
        return self.make(
            split,
            number,
            question="\n".join(x for x in (str(row.get("hint") or "").replace("nan", ""), first(row, "question")) if x),
            images=pictures(row, "image"),
            options=option_texts(row),
            answer=first(row, "answer"),
            category=first(row, "category", default="unknown"),
        )
