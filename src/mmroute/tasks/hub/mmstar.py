"""MMStar: items that cannot be answered without the picture, by six abilities with three parts each.

Source: MMStar (arXiv 2403.20330). The figure is the mean over parts, which are of equal size.
"""

from collections.abc import Sequence
from typing import ClassVar

from mmroute.tasks.base import Card, Sample, Score, group_mean
from mmroute.tasks.hub._fields import first, option_texts, pictures, split_options
from mmroute.tasks.hub._public import Public
from mmroute.tasks.hub._readers import HubRows, Row, Tsv

__all__ = ["MMStar"]


class MMStar(Public):
    """A letter; by ability, and the mean of their parts."""

    name = "mmstar"
    card: ClassVar[Card] = Card(("Lin-Chen/MMStar",), {"val": 1500}, "unknown", "generate", "mean of parts", 0.25)
    sources = (
        Tsv("MMStar"),
        HubRows("Lin-Chen/MMStar"),
    )
    categories = ("category",)

    def sample(self, row: Row, split: str, number: int) -> Sample:
        question, listed = split_options(first(row, "question"))
        return self.make(
            split,
            number,
            question=question,
            images=pictures(row, "image"),
            options=listed or option_texts(row),
            answer=first(row, "answer"),
            category=first(row, "category"),
            part=first(row, "l2_category", "l2-category", default="unknown"),
        )

    def metrics(self, samples: Sequence[Sample], scores: Sequence[Score]) -> dict[str, float]:
        parts = group_mean([s.meta["part"] for s in samples], [s.correct or 0.0 for s in scores])
        return super().metrics(samples, scores) | {"mean_of_parts": parts}
