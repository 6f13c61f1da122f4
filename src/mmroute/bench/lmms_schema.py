"""`lmms/2`: what a run of lmms-eval found, and what the same items cost; the table of several such runs.

What all result files share stands in `bench.schema`.
"""

from pathlib import Path
from typing import Literal

from mmroute.bench import schema, table
from mmroute.bench.schema import Numbers, Run
from mmroute.config import options

__all__ = ["LmmsResult", "LmmsTask", "lmms_table", "read_lmms"]


@options
class LmmsTask:
    """One task; what is not a figure of lmms-eval's is a mean over its items."""

    n: int
    ids_sha256: str
    """Of the item ids in order: two results with equal hashes answered the same items."""
    figures: Numbers
    """As lmms-eval names them: `acc,none`, `acc_stderr,none`."""
    prompt_tokens: float
    output_tokens: float
    """Sequential steps after the prompt, the closing token included."""
    reasoning_tokens: float
    """Of those, the ones before the last hop, which gives the answer."""
    flops: float
    kv_bytes: float
    vision_keep: float
    text_keep: float
    """Share of the given positions that ran, over all layers."""


@options
class LmmsResult:
    run: Run
    """Of the command that wrote the file; the time is lmms-eval's."""
    harness: str
    """lmms-eval's own command, from the arguments that it says it was given."""
    model: str
    recipe: str
    versions: dict[str, str]
    tasks: dict[str, LmmsTask]
    schema: Literal["lmms/2"] = "lmms/2"


def read_lmms(path: Path) -> LmmsResult:
    """A run's result file; errors as in `schema.read_result`."""
    return schema.read_as(path, LmmsResult, "lmms/2")


def lmms_table(results: list[LmmsResult]) -> str:
    """One line per task and recipe; ratios are to the recipe `none` of the same model on the same items."""
    lines = [(name, r, task) for r in results for name, task in r.tasks.items()]
    lines.sort(key=lambda line: (line[0], line[1].model, line[1].recipe != "none", line[1].recipe))
    stock = {(name, r.model, task.ids_sha256): task for name, r, task in lines if r.recipe == "none"}
    rows = []
    for name, r, task in lines:
        base = stock.get((name, r.model, task.ids_sha256))
        rows.append(
            [
                name,
                r.model,
                r.recipe,
                _figures(task.figures),
                "n/a" if base is None else f"{task.flops / base.flops:.3f}",
                "n/a" if base is None else f"{task.kv_bytes / base.kv_bytes:.3f}",
                f"{task.vision_keep:.2f} / {task.text_keep:.2f}",
                f"{task.prompt_tokens:.1f} / {task.output_tokens:.1f} / {task.reasoning_tokens:.1f}",
                str(task.n),
            ]
        )
    head = [
        "task",
        "model",
        "recipe",
        "lmms-eval says (standard error)",
        "FLOP ratio",
        "KV ratio",
        "kept vision / text",
    ]
    return table.markdown([*head, "tokens of prompt / output / reasoning", "n"], rows)


def _figures(figures: Numbers) -> str:
    """Each figure with the standard error that belongs to it, where the harness gives one."""
    said = []
    for key, value in figures.items():
        name, _, kind = key.partition(",")
        if "_stderr" not in name:
            error = figures.get(f"{name}_stderr,{kind}")
            said.append(f"{name} {value:.3f}" + ("" if error is None else f" ({error:.3f})"))
    return ", ".join(said)
