"""Samples made by hand, so that data in and out is tested without any world."""

import dataclasses
from typing import Any

from PIL import Image

from mmroute.tasks._pictures import open_image
from mmroute.tasks.base import Choice, Hop, Sample

LETTERS = [Choice("A", "red plate"), Choice("B", "blue plate"), Choice("C"), Choice("D")]


def picture(value: int, side: int = 8) -> Image.Image:
    """A small picture that differs from those of other values in every pixel."""
    return Image.new("RGB", (side, side), (value % 256, 7 * value % 256, 255 - value % 256))


def sample(index: int = 0, **changes: Any) -> Sample:
    """A sample with two hops, one thought image and a box; every field has a telling value."""
    made = Sample(
        id=f"maze-v1-small-test-{index:06d}",
        task="maze",
        split="test",
        group=f"quad-{index // 4:06d}",
        question='Where does the agent end?\nMoves: right, down. "Ünicode"\t.',
        images=[picture(index), picture(index + 100)],
        prompt_images=[0],
        hops=[
            Hop("Go right.", image=1, state="r0c2", relevant=[9, 10]),
            Hop("Go down.", boxes=[[0.1, 0.2, 1 / 3, 1.0]], box_image=0, state="r1c2", relevant=[18]),
        ],
        choices=LETTERS,
        answer="B",
        answer_index=1,
        answer_text="The answer is B.",
        difficulty={
            "level": "easy",
            "score": 0.18,
            "hops": 2,
            "grid": 3,
            "distractors": 3,
            "blocked": 0,
            "noise": 0.02,
            "solvable": True,
        },
        meta={"layout_hash": "ab12", "canvas": [8, 8, 28], "nested": {"b": [1.5, None], "a": "é"}},
    )
    return dataclasses.replace(made, **changes)


def comparable(item: Sample) -> tuple[Any, ...]:
    """All of a sample with pictures as pixels and boxes as Parquet keeps them; equal samples give equal tuples."""
    pixels = [(p.mode, p.size, p.tobytes()) for p in map(open_image, item.images)]
    hops = [dataclasses.replace(h, boxes=[[round(x, 6) for x in b] for b in h.boxes]) for h in item.hops]
    plain = dataclasses.replace(item, images=[], hops=hops)
    return (*(getattr(plain, f.name) for f in dataclasses.fields(plain)), pixels)
