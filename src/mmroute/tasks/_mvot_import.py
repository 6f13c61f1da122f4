"""MVoT's files as our samples; the format stands in `_mvot.py`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmroute import hub
from mmroute.errors import InputError
from mmroute.tasks import frozenlake
from mmroute.tasks._grid import Cell, inside, split_of
from mmroute.tasks._listed import Listed
from mmroute.tasks._mvot import FATES, LAKE_MOVE, Walk, maze_board
from mmroute.tasks._presets import level_of
from mmroute.tasks._texts import MOVES, coordinate
from mmroute.tasks.base import Hop, Sample, Spec

__all__ = ["from_mvot"]


def from_mvot(root: Path, trusted: bool = True) -> Iterator[Sample]:
    """Samples of an MVoT tree, mazes first, by size.

    Args:
        root: the folder with `maze/` and `frozenlake/` in it, or one of the two.
        trusted: whether moves, states and outcome must be what the simulator says. False is for generators whose
            labels are known to be wrong; such samples carry `untrusted_labels` in meta.

    Raises:
        InputError: not such a tree, a broken file, a missing picture, a path out of the tree, or a trajectory that
            contradicts its own board.
    """
    root = Path(root)
    mazes = sorted(root.glob("maze/grid*.json"), key=_number)
    lakes = sorted(root.glob("frozenlake/level*/data.json"), key=lambda p: _number(p.parent))
    if not mazes and not lakes:
        raise InputError(f"{root} is no MVoT tree: it has neither maze/grid*.json nor frozenlake/level*/data.json")
    return _samples(root, mazes, lakes, trusted)


def _samples(root: Path, mazes: list[Path], lakes: list[Path], trusted: bool) -> Iterator[Sample]:
    for path in mazes:
        for i, entry in enumerate(_load(path, list)):
            where = f"{path}: entry {i}"
            yield _sample(_guarded(_maze_walk, entry, root, where), where, trusted)
    for path in lakes:
        for name, env in _load(path, dict).items():
            where = f"{path}: {name}"
            count = len(_guarded(lambda e, *_: e["actions"], env, root, where))
            for i in range(count):
                here = f"{where}: episode {i}"
                yield _sample(_guarded(_lake_walk, (name, env, i), path.parent, here), here, trusted)


def _number(path: Path) -> int:
    digits = "".join(ch for ch in path.stem if ch.isdigit())
    return int(digits) if digits else -1


def _load(path: Path, kind: type) -> Any:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, kind):
        raise InputError(f"{path}: a JSON {kind.__name__} is expected, given {type(data).__name__}")
    return data


def _guarded(read: Any, data: Any, folder: Path, where: str) -> Any:
    """What `read` makes of foreign data, whose faults it need not foresee one by one."""
    try:
        return read(data, folder, where)
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: not as MVoT writes it: {type(error).__name__} {error}") from None


def _maze_walk(entry: dict[str, Any], root: Path, where: str) -> Walk:
    n = int(entry["grid_num"])
    cells = [(int(r), int(c)) for r, c in entry["path_locs"]]
    moves = [str(a).removesuffix("-1") for a in entry["action_list"]]
    plates = [[int(r), int(c)] for r, c in entry["candidate_locs"]]
    world = {
        "walls": "edges",
        "board": maze_board(entry["maze_info"], n, where),
        "start": list(cells[0]),
        "plates": plates,
        "actions": [MOVES.index(m) for m in moves],
    }
    _check_cells([*cells, *((r, c) for r, c in plates)], n, where)
    names = [f"{entry['file_prefix']}_{k + 1}.jpg" for k in range(len(cells))]
    return Walk(
        task="maze",
        n=n,
        cells=cells,
        moves=moves,
        unused=[],
        answer=plates.index(list(cells[-1])),
        world=world,
        frames=[_frame(root, name, where) for name in names],
        known={"path_id": int(entry["path_id"])},
    )


def _lake_walk(data: tuple[str, dict[str, Any], int], folder: Path, where: str) -> Walk:
    name, env, i = data
    desc = str(env["env_desc"])
    n = round(len(desc) ** 0.5)
    if n * n != len(desc) or not set(desc) <= set("SFHG") or desc.count("G") != 1:
        raise InputError(f"{where}: env_desc is a square of S, F, H and one G, given {desc!r}")
    cells = [divmod(int(s), n) for s in env["states"][i]]
    moves = [LAKE_MOVE[a] for a in env["actions"][i]]
    unused = [int(a) for a in env["additional_actions"][i]]
    _check_cells(cells, n, where)
    fate = env["exec_states"][i]
    if fate not in FATES:
        raise InputError(f"{where}: exec_states is one of {', '.join(FATES)}, given {fate!r}")
    # A truncated run has no end behind which further moves would be void: to the simulator they do not exist.
    listed = moves if fate == "truncated" else [*moves, *(LAKE_MOVE[a] for a in unused)]
    world = {
        "grid": [[int(desc[r * n + c] == "H") for c in range(n)] for r in range(n)],
        "start": list(cells[0]),
        "goal": list(divmod(desc.index("G"), n)),
        "actions": [MOVES.index(m) for m in listed],
    }
    data_id = int(env["data_id"][i])
    return Walk(
        task="frozenlake",
        n=n,
        cells=cells,
        moves=moves,
        unused=[LAKE_MOVE[a] for a in unused],
        answer=FATES.index(fate),
        world=world,
        frames=[_frame(folder, f"{data_id}/{k}.png", where) for k in range(len(cells))],
        known={
            "env_id": name,
            "env_desc": desc,
            "data_id": data_id,
            "rewards": env["rewards"][i],
            "additional_actions": unused,
        },
    )


def _check_cells(cells: Sequence[Cell], n: int, where: str) -> None:
    for cell in cells:
        if not inside(cell, n):
            raise InputError(f"{where}: cell {cell} is not on a board of {n} x {n}")


def _frame(root: Path, name: str, where: str) -> Path:
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise InputError(f"{where}: picture {name!r} leaves the folder {root}")
    if not path.is_file():
        raise InputError(f"{where}: picture {name!r} is missing in {root}")
    return path


def _sample(walk: Walk, where: str, trusted: bool) -> Sample:
    if len(walk.cells) != len(walk.moves) + 1:
        raise InputError(f"{where}: {len(walk.moves)} moves need {len(walk.moves) + 1} states, given {len(walk.cells)}")
    task: Listed = hub.load("tasks", walk.task, preset="mvot")
    key = task.layout_key(walk.world)
    spec = Spec(
        task=walk.task,
        version=task.version,
        preset="mvot",
        split=split_of(key),
        index=walk.known.get("path_id", walk.known.get("data_id", 0)),
        n=walk.n,
        canvas=max(walk.n, task.preset.canvas),
        offset=(0, 0),
        seed=0,
        world=walk.world,
        answer=walk.answer,
        layout_hash=key,
    )
    known = dict(walk.known)
    truth = [s.cell for s in task.trace(spec)]
    if truth != walk.cells:
        if trusted:
            raise InputError(
                f"{where}: the moves lead through {truth} on this board, not {walk.cells}; "
                "to read trees with wrong labels use: --from mvot-dare"
            )
        known["cells"] = [list(cell) for cell in walk.cells]
    if trusted and walk.task == "frozenlake" and (fate := _fate(walk)) != walk.answer:
        raise InputError(f"{where}: on this board the run ends in {FATES[fate]}, not {FATES[walk.answer]}")
    hops = [
        Hop(f"Go {move}.", image=i, state=coordinate(*cell))
        for i, (move, cell) in enumerate(zip(walk.moves, walk.cells[1:], strict=True), start=1)
    ]
    blocked = sum(a == b for a, b in zip(walk.cells, walk.cells[1:], strict=False))
    score, level = level_of(len(hops), walk.n, blocked / max(len(hops), 1), 0.0)
    choices = task.choices(spec)
    label = choices[walk.answer].label
    meta = {
        "spec": json.loads(spec.to_json()),
        "layout_hash": key,
        "generator": "mvot",
        "canvas": [],
        "skin": "mvot",
        "source": "mvot",
        "mvot": known,
    }
    return Sample(
        id=f"{walk.task}-mvot-{walk.n}-{spec.index:06d}",
        task=walk.task,
        split=spec.split,
        group="",
        question=task.question(spec),
        images=walk.frames,
        prompt_images=[0],
        hops=hops,
        choices=choices,
        answer=label,
        answer_index=walk.answer,
        answer_text=f"The answer is {label}.",
        difficulty={
            "level": level,
            "score": score,
            "hops": len(hops),
            "grid": walk.n,
            "distractors": len(choices) - 1,
            "blocked": blocked,
            "noise": 0.0,
            "solvable": True,
        },
        meta=meta if trusted else meta | {"untrusted_labels": True},
    )


def _fate(walk: Walk) -> int:
    return frozenlake.outcome(walk.world["grid"], tuple(walk.world["goal"]), walk.cells[-1])
