"""MVoT's files, out and in: a tree of trajectories with one picture per state. Its loader's rows are `_mvot_rows`.

    maze/grid{n}.json                      list of {path_id, grid_num, path_locs, file_prefix, action_list, ..}
    maze/grid{n}/path_{path_id}_{k}.jpg    k = 1 .. T + 1
    frozenlake/level{n}/data.json          environment -> lists over its episodes: actions, states, data_id, ..
    frozenlake/level{n}/{data_id}/{k}.png  k = 0 .. T

A tree that is read and written again is the same tree, pictures byte for byte; a sample that was written and read has
the same question, hops, states, choices and answer (its id, its split and what only our worlds know are not in a tree).

Source: MVoT (arXiv 2501.07542) and its public toy data, behaviour only; all wording here is our own.
Deviates: `rewards` is one number per action, 1 at the goal; the start of a lake is written `S` in `env_desc`, where the
    toy data may have `F` (both are read). JPEG is written at quality 95 without chroma subsampling.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmroute import hub
from mmroute.errors import InputError
from mmroute.tasks import frozenlake, maze
from mmroute.tasks._grid import Cell, inside, reverse, split_of, step
from mmroute.tasks._io import new_folder
from mmroute.tasks._listed import Listed
from mmroute.tasks._pictures import open_image, png_bytes
from mmroute.tasks._presets import level_of
from mmroute.tasks._texts import MOVES, coordinate
from mmroute.tasks.base import Generated, Hop, Sample, Spec

__all__ = ["from_mvot", "listed_moves", "to_mvot"]

LAKE_MOVES = ("left", "down", "right", "up")
_LAKE_MOVE = dict(enumerate(LAKE_MOVES))
DOWN, RIGHT = MOVES.index("down"), MOVES.index("right")
FATES = ("success", "terminated", "truncated")


class _Walk(NamedTuple):
    """One trajectory, whichever task it is of."""

    task: str
    n: int
    cells: list[Cell]
    """States 0 .. T."""
    moves: list[str]
    """The T executed moves."""
    unused: list[str]
    """Listed moves that come after the end and are not executed."""
    answer: int
    world: dict[str, Any]
    """The world as our task's file writes it."""
    frames: list[Any]
    """Pictures of states 0 .. T."""
    known: dict[str, Any]
    """What a tree says beyond that, kept so that the same tree can be written again."""


# ---------------------------------------------------------------------- out


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


def _walk(sample: Sample) -> _Walk:
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
    return _Walk(
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
    return listed[:executed], listed[executed:] if unused is None else [_LAKE_MOVE[a] for a in unused]


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


def _maze_entry(walk: _Walk, path_id: int) -> dict[str, Any]:
    return {
        "path_id": path_id,
        "grid_num": walk.n,
        "path_locs": [list(cell) for cell in walk.cells],
        "file_prefix": f"maze/grid{walk.n}/path_{path_id}",
        "action_list": [f"{move}-1" for move in walk.moves],
        "candidate_locs": [list(cell) for cell in walk.world["plates"]],
        "maze_info": _maze_info(walk.world, walk.n),
    }


def _maze_info(world: dict[str, Any], n: int) -> str:
    """Passages down of all cells, row-major, then passages right: T open, F closed."""
    cells = [(r, c) for r in range(n) for c in range(n)]
    # Both ways: a wall tile can be left but not entered, and MVoT knows only walls between cells.
    return "".join(
        "FT"[maze.passable(world, cell, a) and maze.passable(world, step(cell, a), reverse(a))]
        for a in (DOWN, RIGHT)
        for cell in cells
    )


def _maze_board(info: str, n: int, where: str) -> list[list[int]]:
    """`_maze_info` back: bit a of a cell is set where a wall stands in direction a."""
    if len(info) != 2 * n * n or not set(info) <= {"T", "F"}:
        raise InputError(f"{where}: maze_info is {2 * n * n} letters T or F for {n} x {n} cells, given {info!r}")
    board = [[15] * n for _ in range(n)]
    for i, letter in enumerate(info):
        move, here = (DOWN, RIGHT)[i // (n * n)], divmod(i % (n * n), n)
        there = step(here, move)
        if letter == "F":
            continue
        if not inside(there, n):
            raise InputError(f"{where}: maze_info opens cell {here} towards the outside")
        board[here[0]][here[1]] &= ~(1 << move)
        board[there[0]][there[1]] &= ~(1 << reverse(move))
    return board


def _add_episode(walk: _Walk, level: dict[str, dict[str, Any]]) -> int:
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


# ---------------------------------------------------------------------- in


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


def _maze_walk(entry: dict[str, Any], root: Path, where: str) -> _Walk:
    n = int(entry["grid_num"])
    cells = [(int(r), int(c)) for r, c in entry["path_locs"]]
    moves = [str(a).removesuffix("-1") for a in entry["action_list"]]
    plates = [[int(r), int(c)] for r, c in entry["candidate_locs"]]
    world = {
        "walls": "edges",
        "board": _maze_board(entry["maze_info"], n, where),
        "start": list(cells[0]),
        "plates": plates,
        "actions": [MOVES.index(m) for m in moves],
    }
    _check_cells([*cells, *((r, c) for r, c in plates)], n, where)
    names = [f"{entry['file_prefix']}_{k + 1}.jpg" for k in range(len(cells))]
    return _Walk(
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


def _lake_walk(data: tuple[str, dict[str, Any], int], folder: Path, where: str) -> _Walk:
    name, env, i = data
    desc = str(env["env_desc"])
    n = round(len(desc) ** 0.5)
    if n * n != len(desc) or not set(desc) <= set("SFHG") or desc.count("G") != 1:
        raise InputError(f"{where}: env_desc is a square of S, F, H and one G, given {desc!r}")
    cells = [divmod(int(s), n) for s in env["states"][i]]
    moves = [_LAKE_MOVE[a] for a in env["actions"][i]]
    unused = [int(a) for a in env["additional_actions"][i]]
    _check_cells(cells, n, where)
    fate = env["exec_states"][i]
    if fate not in FATES:
        raise InputError(f"{where}: exec_states is one of {', '.join(FATES)}, given {fate!r}")
    # A truncated run has no end behind which further moves would be void: to the simulator they do not exist.
    listed = moves if fate == "truncated" else [*moves, *(_LAKE_MOVE[a] for a in unused)]
    world = {
        "grid": [[int(desc[r * n + c] == "H") for c in range(n)] for r in range(n)],
        "start": list(cells[0]),
        "goal": list(divmod(desc.index("G"), n)),
        "actions": [MOVES.index(m) for m in listed],
    }
    data_id = int(env["data_id"][i])
    return _Walk(
        task="frozenlake",
        n=n,
        cells=cells,
        moves=moves,
        unused=[_LAKE_MOVE[a] for a in unused],
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


def _sample(walk: _Walk, where: str, trusted: bool) -> Sample:
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


def _fate(walk: _Walk) -> int:
    return frozenlake.outcome(walk.world["grid"], tuple(walk.world["goal"]), walk.cells[-1])
