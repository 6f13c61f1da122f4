"""POPE: is a thing there that is not? Object hallucination by yes-or-no questions.

Source: POPE (arXiv 2305.10355); three ways to choose absent things: random, popular, adversarial. Yes is positive.
"""

from collections.abc import Sequence
from typing import ClassVar

from mmroute.tasks.base import Card, Sample, Score
from mmroute.tasks.hub._fields import first, is_yes, pictures
from mmroute.tasks.hub._public import YES_NO_PROMPT, Public
from mmroute.tasks.hub._readers import HubRows, JsonlWithImages, Row, Tsv
from mmroute.tasks.hub._rules import lmms_exact

__all__ = ["POPE"]


class POPE(Public):
    """Accuracy, precision, recall, F1 and how often yes is said; overall and by category."""

    name = "pope"
    card: ClassVar[Card] = Card(
        ("lmms-lab/POPE", "lmms-lab-encoder/POPE"), {"test": 9000}, "MIT", "generate", "F1", 0.5
    )
    sources = (
        Tsv("POPE"),
        HubRows("lmms-lab/POPE"),
        JsonlWithImages("coco_pope_adversarial.json", fetch="(val2014 of COCO)"),
    )
    prompts: ClassVar = {"yes_no": lambda s: f"{s.question}\n{YES_NO_PROMPT}"}
    scorers: ClassVar = {"lmms": lmms_exact}

    def sample(self, row: Row, split: str, number: int) -> Sample:
        return self.yes_no(
            split,
            number,
            question=first(row, "question", "text"),
            images=pictures(row, "image"),
            yes=is_yes(first(row, "answer", "label")),
            category=first(row, "category", default="adversarial"),
        )

    def metrics(self, samples: Sequence[Sample], scores: Sequence[Score]) -> dict[str, float]:
        out = super().metrics(samples, scores)
        said = [s.prediction == "yes" for s in scores]
        gold = [s.answer == "yes" for s in samples]
        hits = sum(a and b for a, b in zip(said, gold, strict=True))
        precision, recall = hits / max(sum(said), 1), hits / max(sum(gold), 1)
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        return out | {
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "yes_ratio": sum(said) / max(len(said), 1),
        }
