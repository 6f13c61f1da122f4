"""How many held-out items a small model answers right: greedy chains, written in batches, scored as anyone's are.

python -m mmroute.train.exam src/mmroute/assets/tiny --out src/mmroute/assets/tiny/EXAM.json
"""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from mmroute import hub
from mmroute.bench.stats import wilson
from mmroute.config import read_yaml
from mmroute.files import write_json
from mmroute.origin import origin_here
from mmroute.tasks import _skins
from mmroute.tasks._texts import EOS, VOCABULARY
from mmroute.tasks.base import Generated, Spec
from mmroute.train.decode import greedy
from mmroute.train.examples import Item, collate, item

__all__ = ["examine", "examine_all"]

logger = logging.getLogger(__name__)

_BATCH = 100
_SLACK = 8
"""Words that a chain may run over the right one before it is cut."""


def examine(
    model: Qwen2_5_VLForConditionalGeneration,
    task: Generated,
    specs: Sequence[Spec],
    atlas: Tensor,
    index: Mapping[str, int],
    blank: bool = False,
) -> dict[str, Any]:
    """Accuracy on these items, with its 95 % interval and by side of the board.

    Args:
        model: computes in its own dtype.
        atlas: all tiles, (A, px, px, 3).
        index: word to token id.
        blank: every picture is replaced by plain grey.
    """
    by_length: dict[int, list[tuple[Spec, Item]]] = defaultdict(list)
    for spec in specs:
        asked = item(task, spec, "cot")
        by_length[len(asked.words.prompt)].append((spec, asked))
    right: dict[int, list[float]] = defaultdict(list)
    exact = 0
    for same in by_length.values():
        for start in range(0, len(same), _BATCH):
            part = same[start : start + _BATCH]
            longest = max(len(asked.words.response) for _, asked in part)
            batch = collate([asked for _, asked in part], index, answer=False).to(atlas.device)
            for (spec, asked), row in zip(part, greedy(model, batch, atlas, longest + _SLACK, blank), strict=True):
                words = [VOCABULARY[token] for token in row]
                score = task.score(task.sample(spec), " ".join(word for word in words if word != EOS))
                right[spec.n].append(score.correct or 0.0)
                exact += words == asked.words.response
    num_right, n = int(sum(map(sum, right.values()))), len(specs)
    return {
        "n": n,
        "accuracy": round(num_right / n, 4),
        "ci95": [round(bound, 4) for bound in wilson(num_right, n)],
        "exact_chains": round(exact / n, 4),
        "by_size": {str(size): round(sum(of) / len(of), 4) for size, of in sorted(right.items())},
    }


def examine_all(
    model: Qwen2_5_VLForConditionalGeneration,
    tasks: Mapping[str, Generated],
    atlas: Tensor,
    index: Mapping[str, int],
    items: int,
    blank: int,
) -> dict[str, dict[str, Any]]:
    """By task: accuracy on the first `items` of the split test, and on the first `blank` with the picture blanked."""
    out = {}
    for name, task in tasks.items():
        specs = [task.spec("test", i) for i in range(items)]
        out[name] = {
            **examine(model, task, specs, atlas, index),
            "chance": task.card.chance,
            "blank": examine(model, task, specs[:blank], atlas, index, blank=True),
        }
        logger.info("%s: %s", name, out[name])
    return out


def main(
    folder: Path,
    out: Annotated[Path, typer.Option(help="Result file.")],
    items: Annotated[int, typer.Option(help="Held-out items per task.")] = 500,
    blank: Annotated[int, typer.Option(help="Of these, how many once more with the picture blanked.")] = 200,
) -> None:
    """Examines a checkpoint folder that the backbone trainer wrote, on the tasks its recipe names."""
    recipe = read_yaml(folder / "recipe.yaml")
    tasks = {name: hub.load("tasks", name, preset=recipe["preset"]) for name in recipe["tasks"]}
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = _skins.atlas(2 * model.config.vision_config.patch_size)
    atlas = torch.tensor(pixels.reshape(-1, *pixels.shape[2:]), dtype=torch.float32)
    results = {
        **origin_here("python -m mmroute.train.exam"),
        "preset": recipe["preset"],
        "split": "test",
        "decoding": "greedy, written chain, weights as stored (bf16), computed in fp32",
        "tasks": examine_all(model, tasks, atlas, {word: i for i, word in enumerate(VOCABULARY)}, items, blank),
    }
    write_json(out, results)


if __name__ == "__main__":
    typer.run(main)
