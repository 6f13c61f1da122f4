"""Winoground: two pictures and two captions with the same words; which goes with which?

A row is four samples: each picture with both captions to choose from (text), each caption with both pictures (image).
A score counts when both of its samples are right, the group score when all four are.

Source: Winoground (arXiv 2204.03162); gated on the Hub, its license must be accepted there.
Deviates: the paper compares scores of image-text pairs; a chat model is asked to choose, so chance is 1/4, 1/4, 1/16.
"""

from collections.abc import Sequence
from typing import ClassVar

from mmroute.tasks.base import Card, Sample, Score, group_accuracy
from mmroute.tasks.hub._fields import first
from mmroute.tasks.hub._public import Public
from mmroute.tasks.hub._readers import HubRows, JsonlWithImages, Row

__all__ = ["Winoground"]


class Winoground(Public):
    """Text, image and group score."""

    name = "winoground"
    card: ClassVar[Card] = Card(("facebook/winoground",), {"test": 400}, "Meta research", "generate", "group", 1 / 16)
    sources = (
        HubRows("facebook/winoground"),
        JsonlWithImages("examples.jsonl", columns=("image_0", "image_1"), fetch="(accept the license on the Hub)"),
    )
    categories = ("kind",)

    def expand(self, row: Row, split: str, number: int) -> list[Sample]:
        return [self._one(row, split, number, kind, which) for kind in ("text", "image") for which in (0, 1)]

    def sample(self, row: Row, split: str, number: int) -> Sample:
        return self._one(row, split, number, "text", 0)

    def _one(self, row: Row, split: str, number: int, kind: str, which: int) -> Sample:
        images = [first(row, "image_0"), first(row, "image_1")]
        captions = [first(row, "caption_0"), first(row, "caption_1")]
        asks_text = kind == "text"
        return self.make(
            split,
            number,
            question="Which caption describes the image?"
            if asks_text
            else f'Which image shows "{captions[which]}"? First image: <image 1> Second image: <image 2>',
            images=[images[which]] if asks_text else images,
            options=captions if asks_text else ["the first image", "the second image"],
            answer=which,
            group=f"{self.name}-{split}-{number:06d}",
            key=f"{kind}{which}",
            kind=kind,
            tag=str(row.get("collapsed_tag", row.get("tag", ""))),
        )

    def metrics(self, samples: Sequence[Sample], scores: Sequence[Score]) -> dict[str, float]:
        out = super().metrics(samples, scores)
        for kind, size in (("text", 2), ("image", 2), ("group", 4)):
            part = [(s, c) for s, c in zip(samples, scores, strict=True) if kind in (s.meta["kind"], "group")]
            right = [c.correct or 0.0 for _, c in part]
            out[f"{kind}_score"] = group_accuracy([s.group for s, _ in part], right, size)
        return out
