"""Our mazes and lakes as MVoT's files; the format stands in `_mvot.py`."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmroute import hub
from mmroute.errors import InputError
from mmroute.tasks._io import new_folder
from mmroute.tasks._mvot import FATES, LAKE_MOVE, LAKE_MOVES, Walk, maze_info
from mmroute.tasks._pictures import open_image, png_bytes
from mmroute.tasks._texts import MOVES
from mmroute.tasks.base import Generated, Sample, Spec

__all__ = ["listed_moves", "to_mvot"]


def to_mvot(samples: Iterable[Sample], out: Path) -> int:
    """Writes samples of `maze` and `frozenlake` as a new MVoT tree; returns how many.

    Pictures that are not MVoT's own are drawn anew in its skin.

    Raises:
        InputError: no samples, one of another task or without its spec, or a place that cannot be written.
    """
    mazes: dict[int, list[dict[str, Any]]] = {}
    lakes: dict[int, dict[str, dict[str, Any]]] = {}
    with new_folder(out) as root:
        for sample in samples:
            walk = _walk(sample)
            if walk.task == "maze":
                entries = mazes.setdefault(walk.n, [])
                entries.append(_maze_entry(walk, _free(walk.known.get("path_id"), {e["path_id"] for e in entries})))
                _save(walk.frames, root, [f"{entries[-1]['file_prefix']}_{k + 1}.jpg" for k in range(len(walk.cells))])
            else:
                level = lakes.setdefault(walk.n, {})
                data_id = _add_episode(walk, level)
                folder = f"frozenlake/level{walk.n}/{data_id}"
                _save(walk.frames, root, [f"{folder}/{k}.png" for k in range(len(walk.cells))])
        count = sum(map(len, mazes.values())) + sum(
            len(e["actions"]) for level in lakes.values() for e in level.values()
        )
        if not count:
            raise InputError(f"{out}: there are no samples to export")
        for n, entries in mazes.items():
            (root / f"maze/grid{n}.json").write_text(json.dumps(entries))
        for n, level in lakes.items():
            (root / f"frozenlake/level{n}/data.json").write_text(json.dumps(level))
    return count


def _walk(sample: Sample) -> Walk:
    if sample.task not in ("maze", "frozenlake"):
        raise InputError(f"{sample.id}: MVoT's format holds maze and frozenlake, this is {sample.task}")
    if "spec" not in sample.meta:
        raise InputError(
            f"{sample.id}: meta has no spec, so its board is unknown; only our own samples can be exported"
        )
    spec = Spec.from_dict(sample.meta["spec"])
    known = sample.meta.get("mvot", {})
    task: Generated = hub.load("tasks", sample.task)
    states = task.trace(spec)
    cells = [s.cell for s in states if s.cell is not None]
    if "cells" in known:  # an untrusted tree says something else than the simulator
        cells = [(r, c) for r, c in known["cells"]]
    pictures = [i for i in (sample.prompt_images[0], *(h.image for h in sample.hops)) if i >= 0]
    if sample.meta.get("skin") == "mvot" and len(pictures) == len(cells):
        frames = [sample.images[i] for i in pictures]
    else:
        frames = [task.draw(spec, state, "mvot") for state in states]
    moves, unused = listed_moves(sample, len(cells) - 1)
    return Walk(
        task=sample.task,
        n=spec.n,
        cells=cells,
        moves=moves,
        unused=unused,
        answer=sample.answer_index,
        world=spec.world,
        frames=frames,
        known=known,
    )


def listed_moves(sample: Sample, executed: int) -> tuple[list[str], list[str]]:
    """The moves that are executed, and those that only stand in the prompt."""
    listed = [MOVES[a] for a in sample.meta["spec"]["world"]["actions"]]
    unused = sample.meta.get("mvot", {}).get("additional_actions")
    return listed[:executed], listed[executed:] if unused is None else [LAKE_MOVE[a] for a in unused]


def _free(wanted: int | None, taken: set[int]) -> int:
    """The id a tree gave, if it is still free, else the next number."""
    return wanted if wanted is not None and wanted not in taken else max(taken, default=-1) + 1


def _save(frames: Sequence[Any], root: Path, names: Sequence[str]) -> None:
    for image, name in zip(frames, names, strict=True):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not hasattr(image, "tobytes") and Path(image).suffix == path.suffix:
            shutil.copyfile(image, path)  # JPEG again would lose a little more each time
        elif path.suffix == ".png":
            path.write_bytes(png_bytes(image))
        else:
            open_image(image).convert("RGB").save(path, quality=95, subsampling=0)


def _maze_entry(walk: Walk, path_id: int) -> dict[str, Any]:
    return {
        "path_id": path_id,
        "grid_num": walk.n,
        "path_locs": [list(cell) for cell in walk.cells],
        "file_prefix": f"maze/grid{walk.n}/path_{path_id}",
        "action_list": [f"{move}-1" for move in walk.moves],
        "candidate_locs": [list(cell) for cell in walk.world["plates"]],
        "maze_info": maze_info(walk.world, walk.n),
    }


def _add_episode(walk: Walk, level: dict[str, dict[str, Any]]) -> int:
    """Appends the walk to its environment, which is made where it is new; returns its data_id."""
    world, n = walk.world, walk.n
    letters = [["H" if world["grid"][r][c] else "F" for c in range(n)] for r in range(n)]
    for key, letter in (("start", "S"), ("goal", "G")):
        letters[world[key][0]][world[key][1]] = letter
    desc = walk.known.get("env_desc") or "".join(letter for row in letters for letter in row)
    name = walk.known.get("env_id") or next((k for k, e in level.items() if e["env_desc"] == desc), f"env_{len(level)}")
    keys = ("actions", "states", "rewards", "data_id", "exec_states", "additional_actions")
    env = level.setdefault(name, {"env_desc": desc, **{key: [] for key in keys}})
    data_id = _free(walk.known.get("data_id"), {i for e in level.values() for i in e["data_id"]})
    rewards = [0.0] * len(walk.moves)
    if walk.answer == 0 and rewards:
        rewards[-1] = 1.0
    env["actions"].append([LAKE_MOVES.index(m) for m in walk.moves])
    env["states"].append([r * n + c for r, c in walk.cells])
    env["rewards"].append(walk.known.get("rewards", rewards))
    env["data_id"].append(data_id)
    env["exec_states"].append(FATES[walk.answer])
    env["additional_actions"].append([LAKE_MOVES.index(m) for m in walk.unused])
    return data_id
