"""GQA: compositional questions about real scenes, answered by a word.

Source: GQA (arXiv 1902.09506), balanced test-dev; questions and pictures are kept apart and joined by imageId.
"""

from typing import ClassVar

from mmroute.tasks.base import Card, Sample
from mmroute.tasks.hub._fields import first, pictures
from mmroute.tasks.hub._public import WORD_PROMPT, Public
from mmroute.tasks.hub._readers import HubRows, Row, Tsv
from mmroute.tasks.hub._rules import exact, lmms_exact

__all__ = ["GQA"]


class GQA(Public):
    """Exact match; case, punctuation and articles do not count."""

    name = "gqa"
    card: ClassVar[Card] = Card(
        ("lmms-lab/GQA", "lmms-lab-encoder/GQA"), {"testdev": 12_578}, "CC-BY-4.0", "generate", "exact match", 0.0
    )
    sources = (
        Tsv("GQA_TestDev_Balanced"),
        HubRows(
            "lmms-lab/GQA",
            configs=("testdev_balanced_instructions",),
            join=("testdev_balanced_images", "imageId", "id"),
        ),
    )
    prompts: ClassVar = {"word": lambda s: f"{s.question}\n{WORD_PROMPT}"}
    scorers: ClassVar = {"default": exact, "exact": exact, "lmms": lmms_exact}
    categories = ()

    def sample(self, row: Row, split: str, number: int) -> Sample:
        return self.make(
            split,
            number,
            question=first(row, "question"),
            images=pictures(row, "image"),
            answer=first(row, "answer"),
            full_answer=row.get("fullAnswer") or "",
        )
