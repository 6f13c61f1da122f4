"""BLINK: fourteen tasks of perception that people solve within a blink, with up to four pictures.

Source: BLINK (arXiv 2404.12390), validation split; labels of the test split are not public.
"""

from collections.abc import Sequence
from typing import ClassVar

from mmroute.tasks.base import Card, Sample, Score
from mmroute.tasks.hub._fields import first, option_texts, pictures
from mmroute.tasks.hub._public import Public, by, mean
from mmroute.tasks.hub._readers import HubRows, Row, Tsv

__all__ = ["BLINK"]


_PARTS = (
    "Art_Style",
    "Counting",
    "Forensic_Detection",
    "Functional_Correspondence",
    "IQ_Test",
    "Jigsaw",
    "Multi-view_Reasoning",
    "Object_Localization",
    "Relative_Depth",
    "Relative_Reflectance",
    "Semantic_Correspondence",
    "Spatial_Relation",
    "Visual_Correspondence",
    "Visual_Similarity",
)


class BLINK(Public):
    """A letter; by task, and the mean of the tasks."""

    name = "blink"
    card: ClassVar[Card] = Card(
        ("BLINK-Benchmark/BLINK",), {"val": 1901}, "Apache-2.0", "generate", "mean of tasks", 0.38
    )
    sources = (Tsv("BLINK"), HubRows("BLINK-Benchmark/BLINK", configs=_PARTS))

    def sample(self, row: Row, split: str, number: int) -> Sample:
        return self.make(
            split,
            number,
            question=first(row, "question", "prompt"),
            images=pictures(row, "image_1", "image_2", "image_3", "image_4") or pictures(row, "image"),
            options=option_texts(row, "choices"),
            answer=first(row, "answer"),
            category=first(row, "config", "category", "sub_task", default="unknown"),
        )

    def metrics(self, samples: Sequence[Sample], scores: Sequence[Score]) -> dict[str, float]:
        tasks = by("category", samples, scores).values()
        return super().metrics(samples, scores) | {"mean_of_tasks": sum(tasks) / len(tasks) if tasks else mean(scores)}
