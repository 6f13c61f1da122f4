"""V*Bench: attributes and relative places of small things in large pictures.

Source: V* (arXiv 2312.14135), two categories: direct_attributes and relative_position.
"""

from typing import ClassVar

from mmroute.tasks.base import Card, Sample
from mmroute.tasks.hub._fields import first, option_texts, pictures, split_options
from mmroute.tasks.hub._public import LETTER_PROMPT, Public
from mmroute.tasks.hub._readers import HubRows, JsonlWithImages, Row, Tsv

__all__ = ["VStar"]


class VStar(Public):
    """A letter; overall and by category."""

    name = "vstar"
    card: ClassVar[Card] = Card(
        ("craigwu/vstar_bench", "lmms-lab-encoder/vstar-bench"), {"test": 191}, "MIT", "generate", "accuracy", 0.35
    )
    sources = (
        Tsv("VStarBench"),
        HubRows("lmms-lab-encoder/vstar-bench"),
        JsonlWithImages("test_questions.jsonl", images="."),
    )

    def sample(self, row: Row, split: str, number: int) -> Sample:
        question, options = split_options(first(row, "text", "question").replace(LETTER_PROMPT, ""))
        return self.make(
            split,
            number,
            question=question,
            images=pictures(row, "image"),
            options=options or option_texts(row, "options"),
            answer=first(row, "label", "answer"),
            category=first(row, "category"),
        )
