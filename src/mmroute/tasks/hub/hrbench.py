"""HR-Bench: pictures of 4K and 8K, single things and several; every question four times with its options turned.

Source: HR-Bench (arXiv 2408.15556), by VLMEvalKit's or its own names of tables. Figures are means over the four cycles.
Deviates: its GPT judge becomes the rule `strict`.
"""

from collections.abc import Sequence
from typing import ClassVar

from mmroute.tasks.base import Card, Sample, Score
from mmroute.tasks.hub._fields import first, option_texts, pictures
from mmroute.tasks.hub._public import Public, by
from mmroute.tasks.hub._readers import HubRows, Row, Tsv

__all__ = ["HRBench"]


class HRBench(Public):
    """A letter; single and cross, mean over cycles."""

    name = "hrbench"
    card: ClassVar[Card] = Card(
        ("DreamMr/HR-Bench",),
        {"hrbench_4k": 800, "hrbench_8k": 800},
        "CC-BY-NC-4.0",
        "generate",
        "mean over cycles",
        0.25,
    )
    sources = (
        Tsv("HRBench4K", splits=("hrbench_4k",)),
        Tsv("HRBench8K", splits=("hrbench_8k",)),
        Tsv("hr_bench_4k", splits=("hrbench_4k",)),
        Tsv("hr_bench_8k", splits=("hrbench_8k",)),
        HubRows("DreamMr/HR-Bench"),
    )
    categories = ("category", "cycle")

    def sample(self, row: Row, split: str, number: int) -> Sample:
        return self.make(
            split,
            number,
            question=first(row, "question"),
            images=pictures(row, "image"),
            options=option_texts(row),
            answer=first(row, "answer"),
            group=f"{self.name}-{split}-{first(row, 'question')[:80]}",
            category=first(row, "category"),
            cycle=str(first(row, "cycle_category", "cycle", default="0")),
        )

    def metrics(self, samples: Sequence[Sample], scores: Sequence[Score]) -> dict[str, float]:
        cycles = by("cycle", samples, scores).values()
        return super().metrics(samples, scores) | {"mean_over_cycles": sum(cycles) / max(len(cycles), 1)}
