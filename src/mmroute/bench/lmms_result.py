"""What a run of lmms-eval found, as a small result file: its figures, the costs beside them, its command, all versions.

    lmms-eval --model mmroute ... --output_path out          # with traces=costs.jsonl in its --model_args
    python -m mmroute.bench.lmms_result out costs.jsonl --out results/lmms/frozenlake-dare-lh.json

Run it in the environment that lmms-eval is installed in, which it names.
"""

import hashlib
import json
import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from mmroute.bench.lmms_schema import LmmsResult, LmmsTask
from mmroute.bench.schema import commit_of_source, run_here, write_result
from mmroute.errors import InputError

__all__ = ["summary"]

_PACKAGES = ("lmms_eval", "torch", "transformers", "datasets", "numpy")
_ARGUMENTS = (
    "model",
    "model_args",
    "include_path",
    "tasks",
    "num_fewshot",
    "batch_size",
    "limit",
    "gen_kwargs",
    "seed",
    "output_path",
)
_MEANS = ("prompt_tokens", "output_tokens", "reasoning_tokens", "flops", "kv_bytes")


def summary(folder: Path, traces: Path, command: str = "") -> LmmsResult:
    """The figures of the one run in a folder.

    Args:
        folder: `--output_path` of lmms-eval.
        traces: the side file of the same run.
        command: what is run to write the file.

    Raises:
        InputError: the folder holds no results or those of several runs, or the side file is of another run.
    """
    found = sorted(folder.rglob("*_results.json"))
    if len(found) != 1:
        raise InputError(f"{folder} holds {len(found)} result files of lmms-eval; give the folder of one run")
    said = json.loads(found[0].read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in traces.read_text(encoding="utf-8").splitlines()]
    given = said["config"]["resolved_cli_args"]
    model_args = dict(part.split("=", 1) for part in given["model_args"].split(","))
    recipes = sorted({line["recipe"] for line in lines})
    if len(recipes) != 1:
        named = ", ".join(recipes)
        raise InputError(f"{traces} is of {len(recipes)} recipes ({named}); give the file of one run")
    seconds = float(said["total_evaluation_time_seconds"])
    began = datetime.fromtimestamp(found[0].stat().st_mtime - seconds, UTC).isoformat(timespec="seconds")
    return LmmsResult(
        run=run_here(command, *commit_of_source(), began, seconds),
        harness=_command(given),
        model=model_args.get("pretrained", "tiny"),
        recipe=recipes[0],
        versions={name: metadata.version(name).partition("+")[0] for name in _PACKAGES if _is_installed(name)},
        tasks={
            name: _task(name, figures, said["n-samples"][name]["effective"], lines, traces)
            for name, figures in said["results"].items()
        },
    )


def _task(name: str, figures: dict[str, Any], n: int, lines: list[dict[str, Any]], traces: Path) -> LmmsTask:
    own = sorted((line for line in lines if line["task"] == name), key=lambda line: line["doc_id"])
    if [line["doc_id"] for line in own] != list(range(n)):
        raise InputError(f"{traces} has {len(own)} lines for the {n} items of {name}; give the file of this run")
    return LmmsTask(
        n=n,
        ids_sha256=hashlib.sha256("\n".join(line["id"] for line in own).encode()).hexdigest(),
        figures={key: value for key, value in figures.items() if isinstance(value, int | float)},
        **{key: fmean(line[key] for line in own) for key in _MEANS},
        vision_keep=fmean(line["keep"]["vision"] for line in own),
        text_keep=fmean(line["keep"]["text"] for line in own),
    )


def _command(given: dict[str, Any]) -> str:
    """The command line of these arguments; what was not given is left out."""
    parts = ["lmms-eval"]
    for key in _ARGUMENTS:
        value = given.get(key)
        if value not in (None, ""):
            parts += [f"--{key}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join(parts)


def _is_installed(name: str) -> bool:
    return bool(metadata.packages_distributions().get(name))


def main(
    folder: Annotated[Path, typer.Argument(help="What lmms-eval wrote: its --output_path.")],
    traces: Annotated[Path, typer.Argument(help="Side file that --model_args traces=FILE named.")],
    out: Annotated[Path, typer.Option(help="Result file.")],
) -> None:
    """Writes the result file."""
    result = summary(folder, traces, "python -m mmroute.bench.lmms_result " + shlex.join(sys.argv[1:]))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_result(out, result)


if __name__ == "__main__":
    typer.run(main)
