"""EmbSpatial-Bench: where do things in a room lie to each other, seen by a robot?

Source: EmbSpatial-Bench (arXiv 2406.05756). VoCoT leaves out "on top of" and "inside"; `meta["relation"]` tells.
"""

from typing import ClassVar

from mmroute.tasks.base import Card, Sample
from mmroute.tasks.hub._fields import first, option_texts, pictures
from mmroute.tasks.hub._public import Public
from mmroute.tasks.hub._readers import HubRows, JsonlWithImages, Row, Tsv

__all__ = ["EmbSpatial"]


class EmbSpatial(Public):
    """A letter; by relation and source of the picture. Boxes of the objects stand in `meta`, xywh in pixels."""

    name = "embspatial"
    card: ClassVar[Card] = Card(
        ("Phineas476/EmbSpatial-Bench", "FlagEval/EmbSpatial-Bench"),
        {"test": 3640},
        "MIT",
        "generate",
        "accuracy",
        0.25,
    )
    sources = (
        JsonlWithImages("embspatial_bench.json", encoded=True),
        Tsv("EmbSpatialBench"),
        HubRows("FlagEval/EmbSpatial-Bench"),
    )
    categories = ("relation", "data_source")

    def sample(self, row: Row, split: str, number: int) -> Sample:
        return self.make(
            split,
            number,
            question=first(row, "question"),
            images=pictures(row, "image"),
            options=option_texts(row, "answer_options"),
            answer=first(row, "answer"),
            relation=first(row, "relation", "category", default="unknown"),
            data_source=first(row, "data_source", default="unknown"),
            boxes=[o["bbox"] for o in row["objects"]] if isinstance(row.get("objects"), list) else [],
        )
