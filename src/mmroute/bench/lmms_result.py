"""What a run of lmms-eval found, as a small result file: its figures, the costs beside them, and all versions.

    lmms-eval --model mmroute ... --output_path out          # with traces=costs.jsonl in its --model_args
    python -m mmroute.bench.lmms_result out costs.jsonl --out results/lmms/frozenlake-dare-l.json

Run it in the environment that lmms-eval is installed in, which it names.
"""

import json
import sys
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from mmroute.bench.schema import commit_of_source, write_json
from mmroute.errors import InputError

__all__ = ["summary"]

_PACKAGES = ("lmms_eval", "torch", "transformers", "datasets", "numpy")
_ARGUMENTS = ("model", "model_args", "batch_size", "limit")


def summary(folder: Path, traces: Path) -> dict[str, Any]:
    """The figures of the one run in a folder.

    Args:
        folder: `--output_path` of lmms-eval.
        traces: the side file of the same run.

    Raises:
        InputError: the folder holds no results or those of several runs, or the side file is of another run.
    """
    found = sorted(folder.rglob("*_results.json"))
    if len(found) != 1:
        raise InputError(f"{folder} holds {len(found)} result files of lmms-eval; give the folder of one run")
    said = json.loads(found[0].read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in traces.read_text(encoding="utf-8").splitlines()]
    tasks = {}
    for name, figures in said["results"].items():
        own = [line for line in lines if line["task"] == name]
        n = said["n-samples"][name]["effective"]
        if sorted(line["doc_id"] for line in own) != list(range(n)):
            raise InputError(f"{traces} has {len(own)} lines for the {n} items of {name}; give the file of this run")
        tasks[name] = {
            "n": n,
            "figures": {key: value for key, value in figures.items() if isinstance(value, int | float)},
            "costs": {
                **{key: fmean(line[key] for line in own) for key in ("flops", "kv_bytes", "ar_steps", "prompt_tokens")},
                "keep": {kind: fmean(line["keep"][kind] for line in own) for kind in ("vision", "text")},
            },
        }
    return {"arguments": {key: said["config"].get(key) for key in _ARGUMENTS}, "tasks": tasks}


def main(
    folder: Annotated[Path, typer.Argument(help="What lmms-eval wrote: its --output_path.")],
    traces: Annotated[Path, typer.Argument(help="Side file that --model_args traces=FILE named.")],
    out: Annotated[Path, typer.Option(help="Result file.")],
) -> None:
    """Writes the result file."""
    commit, dirty = commit_of_source()
    result = {
        "schema": "lmms/1",
        "command": "python -m mmroute.bench.lmms_result " + " ".join(sys.argv[1:]),
        "commit": commit,
        "dirty": dirty,
        "versions": {name: metadata.version(name).partition("+")[0] for name in _PACKAGES},
        **summary(folder, traces),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)


if __name__ == "__main__":
    typer.run(main)
