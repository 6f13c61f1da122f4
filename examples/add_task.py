"""How many dots are on the picture? A task of yours: samples, messages, a scorer; run like any other.

python examples/add_task.py FOLDER_OR_HUB_ID
"""

import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

import mmroute
from mmroute.bench.run import answer_items
from mmroute.recipe import read
from mmroute.tasks.base import Card, Choice, Sample, Score, Task

__all__ = ["Dots"]
SPLITS = {"train": 0, "val": 1, "test": 2}


class Dots(Task):
    """One to five dots; nothing random but the seed, which is (split, index)."""

    name = "dots"
    card = Card(("dots-v1",), dict.fromkeys(SPLITS, 1000), "generated", "generate", "accuracy", chance=0.2)

    def samples(self, split: str, n: int | None = None, offset: int = 0) -> Iterator[Sample]:
        for index in range(offset, min(offset + n, 1000) if n is not None else 1000):
            rng = np.random.default_rng([SPLITS[split], index])
            count, image = int(rng.integers(1, 6)), Image.new("RGB", (112, 112), "white")
            for cell in rng.choice(16, count, replace=False):
                x, y = 28 * (int(cell) % 4), 28 * (int(cell) // 4)
                ImageDraw.Draw(image).ellipse((x + 6, y + 6, x + 22, y + 22), fill="black")
            choices = [Choice(str(i)) for i in range(1, 6)]
            head = {"id": f"dots-{split}-{index}", "task": "dots", "split": split, "group": "", "hops": []}
            gold = {"answer": str(count), "answer_index": count - 1, "answer_text": str(count), "difficulty": {}}
            yield Sample(**head, **gold, question="How many dots?", images=[image], prompt_images=[0], choices=choices,
                         meta={})  # fmt: skip

    def messages(self, sample: Sample, style: str | None = None) -> list[dict[str, Any]]:
        image, text = {"type": "image", "image": sample.images[0]}, {"type": "text", "text": sample.question}
        return [{"role": "user", "content": [image, text]}]

    def score(self, sample: Sample, completion: str, scorer: str | None = None) -> Score:
        said = (re.findall(r"\d+", completion) or [None])[-1]  # the last number counts; none is wrong
        return Score(float(said == sample.answer), said, said is not None, "last-number")


def main(model_name: str, n: int = 8, recipe: str = "direct") -> float:
    task = Dots()
    outcome = answer_items(mmroute.load(model_name), read(recipe), task, list(task.samples("test", n)), batch=4)
    print(f"{sum(outcome.correct)} of {n} right; {task.card.chance:.0%} is chance")
    return sum(outcome.correct) / n


if __name__ == "__main__":
    main(*sys.argv[1:2])
