"""ScienceQA: school science with and without pictures; lectures and solutions serve as rationales.

Source: ScienceQA (arXiv 2209.09513); the prompt "Context: hint" is lmms-eval's.
"""

from typing import ClassVar

from mmroute.tasks.base import Card, Sample
from mmroute.tasks.hub._fields import first, option_texts, pictures
from mmroute.tasks.hub._public import Public, letter_prompt
from mmroute.tasks.hub._readers import HubRows, Row, Tsv
from mmroute.tasks.hub._rules import lmms_exact

__all__ = ["ScienceQA"]


def _prompt(sample: Sample) -> str:
    hint = sample.meta["hint"]
    return f"Context: {hint}\n{letter_prompt(sample)}" if hint else letter_prompt(sample)


class ScienceQA(Public):
    """A letter; by subject, and with or without a picture."""

    name = "scienceqa"
    card: ClassVar[Card] = Card(
        ("derek-thomas/ScienceQA", "lmms-lab/ScienceQA", "lmms-lab-encoder/ScienceQA"),
        {"train": 12_726, "validation": 4241, "test": 4241},
        "CC-BY-NC-SA-4.0",
        "generate",
        "accuracy",
        0.4,
    )
    sources = (
        Tsv("ScienceQA_TEST", splits=("test",)),
        Tsv("ScienceQA_VAL", splits=("validation",)),
        HubRows("derek-thomas/ScienceQA"),
    )
    prompts: ClassVar = {"hint": _prompt}
    scorers: ClassVar = {"lmms": lmms_exact}
    categories = ("subject", "has_image")

    def sample(self, row: Row, split: str, number: int) -> Sample:
        images = pictures(row, "image")
        rationale = [str(row[key]) for key in ("lecture", "solution") if row.get(key)]
        return self.make(
            split,
            number,
            question=first(row, "question"),
            images=images,
            options=option_texts(row, "choices"),
            answer=first(row, "answer"),
            hint=row.get("hint") or "",
            rationale=" ".join(rationale),
            subject=first(row, "subject", "category", default="unknown"),
            has_image=bool(images),
        )
