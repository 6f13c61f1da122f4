"""MathVista: mathematics in pictures, free numbers and options.

Source: MathVista (arXiv 2310.02255), testmini. `query` carries the published hints on the form of the answer.
Deviates: GPT's extraction becomes rules: options by letter or text, numbers to the stated precision.
"""

from typing import ClassVar

from mmroute.tasks.base import Card, Sample
from mmroute.tasks.hub._fields import first, option_texts, pictures
from mmroute.tasks.hub._public import Public
from mmroute.tasks.hub._readers import HubRows, Row, Tsv
from mmroute.tasks.hub._rules import letter_or_text

__all__ = ["MathVista"]


class MathVista(Public):
    """A letter or a value; by type of question."""

    name = "mathvista"
    card: ClassVar[Card] = Card(
        ("AI4Math/MathVista",), {"testmini": 1000, "test": 5141}, "CC-BY-SA-4.0", "generate", "accuracy", 0.18
    )
    sources = (Tsv("MathVista_MINI", splits=("testmini",)), HubRows("AI4Math/MathVista"))
    prompts: ClassVar = {"query": lambda s: s.meta["query"] or s.question}
    scorers: ClassVar = {"default": letter_or_text, "value": letter_or_text}
    categories = ("question_type",)

    def sample(self, row: Row, split: str, number: int) -> Sample:
        options = option_texts(row, "choices")
        precision = row.get("precision")
        unit = row.get("unit")
        question = first(row, "question")
        return self.make(
            split,
            number,
            question=f"{question} (Unit: {unit})" if unit else question,
            images=pictures(row, "decoded_image") or pictures(row, "image"),
            options=options,
            answer=row.get("answer") or row.get("answer_option") or "",
            query=row.get("query") or "",
            precision=int(float(precision)) if precision not in (None, "", "nan") else None,
            question_type=first(row, "question_type", default="multi_choice" if options else "free_form"),
        )
