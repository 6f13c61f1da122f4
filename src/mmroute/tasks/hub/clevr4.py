"""CLEVR in four kinds of question, as VoCoT puts it: exist, count, compare and query.

Source: CLEVR (arXiv 1612.06890); selection and options by VoCoT (arXiv 2405.16919), 1000 per kind.
"""

from typing import ClassVar

from mmroute.tasks.base import Card, Sample
from mmroute.tasks.hub._fields import first, option_texts, pictures
from mmroute.tasks.hub._public import Public
from mmroute.tasks.hub._readers import HubRows, JsonlWithImages, Row

__all__ = ["CLEVR4"]


class CLEVR4(Public):
    """A letter; by kind of question."""

    name = "clevr4"
    card: ClassVar[Card] = Card(("luoruipu1/VoCoT",), {"test": 4000}, "CC-BY-4.0", "likelihood", "accuracy", 0.25)
    sources = (
        JsonlWithImages("clevr_{split}.jsonl", fetch="(val of CLEVR v1.0)"),
        HubRows("luoruipu1/VoCoT"),
    )

    def sample(self, row: Row, split: str, number: int) -> Sample:
        return self.make(
            split,
            number,
            question=first(row, "question"),
            images=pictures(row, "image"),
            options=option_texts(row, "options", "choices"),
            answer=first(row, "answer", "label"),
            category=first(row, "type", "category", default="unknown"),
        )
