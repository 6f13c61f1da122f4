"""How many held-out items a small model answers right: greedy chains, written in batches, scored as anyone's are."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from mmroute.bench.stats import wilson
from mmroute.tasks._texts import EOS, VOCABULARY
from mmroute.tasks.base import Generated, Spec
from mmroute.train.decode import greedy
from mmroute.train.examples import Item, collate, item

__all__ = ["examine"]

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
