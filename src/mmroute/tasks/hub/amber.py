"""AMBER, discriminative part: does the model see what is not there, in existence, attribute and relation?

Source: AMBER (arXiv 2311.07397). Precision, recall and F1 count "no" as positive, as its script does: a no is a
    hallucination that was noticed.
Deviates: the generative part (CHAIR, Cover, Hal, Cog) needs spaCy's noun phrases and is not built.
"""

from collections.abc import Sequence
from typing import ClassVar

from mmroute.tasks.base import Card, Sample, Score
from mmroute.tasks.hub._fields import first, is_yes, pictures
from mmroute.tasks.hub._public import YES_NO_PROMPT, Public
from mmroute.tasks.hub._readers import HubRows, JsonlWithImages, Row, Tsv

__all__ = ["AMBER"]


class AMBER(Public):
    """Accuracy and F1; by type of question."""

    name = "amber"
    card: ClassVar[Card] = Card(
        ("github.com/junyangwang0410/AMBER", "Kyunnilee/amber_g"), {"test": 14_216}, "Apache-2.0", "generate", "F1", 0.5
    )
    sources = (
        JsonlWithImages("discriminative.jsonl", images="image", fetch="(pictures are linked from the repository)"),
        Tsv("AMBER"),
        HubRows("Kyunnilee/amber_d"),
    )
    prompts: ClassVar = {"yes_no": lambda s: f"{s.question} {YES_NO_PROMPT}"}
    categories = ("type",)

    def sample(self, row: Row, split: str, number: int) -> Sample:
        kind = str(first(row, "type", "category", default="discriminative"))
        return self.yes_no(
            split,
            number,
            question=first(row, "query", "question"),
            images=pictures(row, "image"),
            yes=is_yes(first(row, "truth", "answer")),
            type=kind.removeprefix("discriminative-"),
        )

    def metrics(self, samples: Sequence[Sample], scores: Sequence[Score]) -> dict[str, float]:
        out = super().metrics(samples, scores)
        said, gold = [s.prediction == "no" for s in scores], [s.answer == "no" for s in samples]
        hits = sum(a and b for a, b in zip(said, gold, strict=True))
        precision, recall = hits / max(sum(said), 1), hits / max(sum(gold), 1)
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        return out | {"precision": precision, "recall": recall, "f1": f1}
