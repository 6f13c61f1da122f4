"""Who follows a run beside its log: a bar on a terminal, TensorBoard's files where asked. The journal tells them."""

import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmroute.errors import MissingExtra

__all__ = ["Bar", "Board", "Follower", "following"]


class Follower(Protocol):
    """What a journal tells of a run."""

    def begin(self, done: int, total: int) -> None:
        """The run goes on behind `done` of at most `total` steps."""

    def hear(self, entry: Mapping[str, Any]) -> None:
        """A line of the log; `step` counts from 1."""


class Bar:
    """Steps done, and the loss of the last one."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)

    def begin(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def hear(self, entry: Mapping[str, Any]) -> None:
        if "loss" not in entry:
            return
        where = entry.get("stage") or entry.get("phase") or ""
        self._progress.update(
            self._task, completed=entry["step"], description=f"{where} loss {entry['loss']:.4f}".strip()
        )


class Board:
    """Every number of the log as a curve of TensorBoard; nested ones by their path (`look/maze/chain`)."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            MissingExtra: tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtra("--tensorboard", "tensorboard", "train") from None
        self._writer_class, self._folder = SummaryWriter, folder
        self._writer: Any = None

    def begin(self, done: int, total: int) -> None:
        # What a killed run wrote behind its last state is written again.
        self._writer = self._writer_class(str(self._folder), purge_step=done + 1 if done else None)

    def hear(self, entry: Mapping[str, Any]) -> None:
        for name, value in _numbers("", {k: v for k, v in entry.items() if k != "step"}):
            self._writer.add_scalar(name, value, entry["step"])

    def close(self) -> None:
        """Puts everything on disk."""
        if self._writer is not None:
            self._writer.close()


@contextmanager
def following(board: Path | None = None, console: Console | None = None) -> Iterator[Sequence[Follower]]:
    """The followers of one run of the command line, until the block ends.

    Args:
        board: folder for TensorBoard; None writes nothing.
        console: where the bar goes; standard error. None is drawn where that is no terminal.

    Raises:
        MissingExtra: a board is asked for and tensorboard is not installed.
    """
    console = console or Console(stderr=True)
    found: list[Follower] = []
    written = Board(board) if board is not None else None
    if written is not None:
        found.append(written)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    progress = Progress(*columns, console=console, transient=True)
    try:
        if console.is_terminal:
            found.append(Bar(progress))
            with progress, _above():
                yield found
        else:
            yield found
    finally:
        if written is not None:
            written.close()


@contextmanager
def _above() -> Iterator[None]:
    """Lines of the log above the bar, which redraws itself below them: the bar has replaced standard error by now."""
    handlers = [h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler)]
    streams = [h.setStream(sys.stderr) for h in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, streams, strict=True):
            if stream is not None:
                handler.setStream(stream)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(f"{name}/{key}" if name else str(key), inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _numbers(f"{name}/{index}", inner)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield name, value
