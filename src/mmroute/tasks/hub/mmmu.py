"""MMMU: college questions of thirty subjects, with up to seven pictures inside the text.

Source: MMMU (arXiv 2311.16502), validation split; labels of the test split are not public.
Deviates: open questions are judged by value or exact text; several gold texts count alike.
"""

import ast
from typing import ClassVar

from mmroute.tasks._parse import Verdict
from mmroute.tasks.base import Card, Sample
from mmroute.tasks.hub._fields import first, option_texts, pictures
from mmroute.tasks.hub._public import LETTER_PROMPT, WORD_PROMPT, Public
from mmroute.tasks.hub._readers import HubRows, Row, SplitColumn, Tsv
from mmroute.tasks.hub._rules import exact, letter_or_text

__all__ = ["MMMU"]


_SUBJECTS = (
    "Accounting",
    "Agriculture",
    "Architecture_and_Engineering",
    "Art",
    "Art_Theory",
    "Basic_Medical_Science",
    "Biology",
    "Chemistry",
    "Clinical_Medicine",
    "Computer_Science",
    "Design",
    "Diagnostics_and_Laboratory_Medicine",
    "Economics",
    "Electronics",
    "Energy_and_Power",
    "Finance",
    "Geography",
    "History",
    "Literature",
    "Manage",
    "Marketing",
    "Materials",
    "Math",
    "Mechanical_Engineering",
    "Music",
    "Pharmacy",
    "Physics",
    "Psychology",
    "Public_Health",
    "Sociology",
)


def _prompt(sample: Sample) -> str:
    lines = [f"{c.label}. {c.text}" for c in sample.choices]
    return "\n".join([sample.question, *lines, LETTER_PROMPT if lines else WORD_PROMPT])


def _any_gold(sample: Sample, completion: str) -> Verdict:
    verdict = letter_or_text(sample, completion)
    if sample.choices or verdict.correct:
        return verdict
    for gold in sample.meta["golds"]:
        other = type(sample)(**{**vars(sample), "answer": gold})
        if letter_or_text(other, completion).correct or exact(other, completion).correct:
            return Verdict(True, verdict.prediction)
    return verdict


class MMMU(Public):
    """A letter or a short answer; by subject."""

    name = "mmmu"
    card: ClassVar[Card] = Card(
        ("MMMU/MMMU",), {"dev": 150, "validation": 900}, "Apache-2.0", "generate", "accuracy", 0.25
    )
    sources = (
        Tsv("MMMU_DEV_VAL", by=SplitColumn("split", {"dev": ("dev",), "validation": ("validation", "val")})),
        HubRows("MMMU/MMMU", configs=_SUBJECTS),
    )
    prompts: ClassVar = {"mixed": _prompt}
    scorers: ClassVar = {"default": _any_gold, "value": _any_gold}
    categories = ("subject",)

    def sample(self, row: Row, split: str, number: int) -> Sample:
        answer = str(first(row, "answer"))
        golds = [str(x) for x in ast.literal_eval(answer)] if answer.startswith("[") else [answer]
        options = option_texts(row, "options")
        return self.make(
            split,
            number,
            question=first(row, "question"),
            images=pictures(row, *(f"image_{i}" for i in range(1, 8))) or pictures(row, "image"),
            options=options,
            answer=golds[0],
            golds=golds,
            subject=first(row, "config", "category", "subfield", default="unknown"),
        )
