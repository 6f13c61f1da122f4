"""MMVP: pairs of pictures that CLIP cannot tell apart, and a question that tells them.

Source: MMVP (arXiv 2401.06209). Labels: the published ones; lmms-lab-eval/MMVP corrects four, and results say so.
"""

from collections.abc import Sequence
from typing import ClassVar

from mmroute.tasks.base import Card, Sample, Score, group_accuracy
from mmroute.tasks.hub._fields import first, option_texts, pictures, split_options
from mmroute.tasks.hub._public import Public
from mmroute.tasks.hub._readers import HubRows, JsonlWithImages, Row, Tsv

__all__ = ["MMVP"]


class MMVP(Public):
    """A letter; accuracy, and pairs with both right."""

    name = "mmvp"
    card: ClassVar[Card] = Card(
        ("MMVP/MMVP", "lmms-lab-eval/MMVP"), {"test": 300}, "MIT", "generate", "pair accuracy", 0.5
    )
    sources = (
        Tsv("MMVP"),
        HubRows("MMVP/MMVP"),
        HubRows("lmms-lab-eval/MMVP", splits={"test": "train"}, labels="lmms-lab-eval, 4 corrected"),
        JsonlWithImages("Questions.jsonl", images="MMVP Images"),
    )
    categories = ()
    label_version = "published"

    def sample(self, row: Row, split: str, number: int) -> Sample:
        question, listed = split_options(f"{first(row, 'Question', 'question')} {row.get('Options', '')}")
        index = int(first(row, "Index", "index", default=str(number + 1)))
        return self.make(
            split,
            number,
            question=question,
            images=pictures(row, "image"),
            options=listed or option_texts(row),
            answer=first(row, "Correct Answer", "answer"),
            group=f"{self.name}-{(index - 1) // 2:04d}",
            index=index,
        )

    def metrics(self, samples: Sequence[Sample], scores: Sequence[Score]) -> dict[str, float]:
        pairs = group_accuracy([s.group for s in samples], [s.correct or 0.0 for s in scores], size=2)
        return super().metrics(samples, scores) | {"pair_accuracy": pairs}
