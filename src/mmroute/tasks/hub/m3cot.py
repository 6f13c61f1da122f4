"""M3CoT: questions that need several steps over text and picture, with written rationales.

Source: M3CoT (arXiv 2405.16473); prompt of three parts as its own evaluation writes them.
"""

from typing import ClassVar

from mmroute.tasks.base import Card, Sample
from mmroute.tasks.hub._fields import first, option_texts, pictures
from mmroute.tasks.hub._public import Public
from mmroute.tasks.hub._readers import HubRows, JsonlWithImages, Row

__all__ = ["M3CoT"]


def _prompt(sample: Sample) -> str:
    lines = [f"({c.label}) {c.text}" for c in sample.choices]
    context = [f"[Context]:\n{sample.meta['context']}"] if sample.meta["context"] else []
    return "\n".join([f"[Question]:\n{sample.question}", *context, "[Options]:", *lines, "Answer:"])


class M3CoT(Public):
    """A letter; by domain and topic. The rule `m3cot_official` is the benchmark's own."""

    name = "m3cot"
    card: ClassVar[Card] = Card(
        ("LightChen2333/M3CoT",),
        {"train": 7863, "validation": 1108, "test": 2318},
        "CC-BY-SA-4.0",
        "generate",
        "accuracy",
        0.3,
    )
    sources = (HubRows("LightChen2333/M3CoT"), JsonlWithImages("{split}.jsonl"))
    prompts: ClassVar = {"m3cot": _prompt}
    categories = ("domain", "topic")

    def sample(self, row: Row, split: str, number: int) -> Sample:
        return self.make(
            split,
            number,
            question=first(row, "question"),
            images=pictures(row, "image"),
            options=option_texts(row, "choices"),
            answer=first(row, "answer"),
            context=row.get("context") or "",
            rationale=row.get("rationale") or "",
            domain=first(row, "domain", default="unknown"),
            topic=first(row, "topic", default="unknown"),
        )
