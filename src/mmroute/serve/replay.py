"""The replay log: one line a request, on disk before the client has its last byte; and policies run over it again.

A line is one unbuffered append in the request's own path, not a background queue: so a killed process has lost no line
of an answer that a client has seen whole. It is not synced: a dead machine may lose some.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmroute.errors import ConfigError, InputError
from mmroute.gate.base import Policy, Rating

__all__ = ["ReplayLog", "read_log", "replay"]


class ReplayLog:
    """Append-only JSONL, rotated by size: `log`, `log.1` (newer) ... `log.N`."""

    def __init__(self, path: Path, most_bytes: int, files: int) -> None:
        self.path, self._most, self._files = path, most_bytes, files
        self.dropped = 0
        """Lines that could not be written; requests go on."""
        self._file = self._open()
        self._size = os.fstat(self._file).st_size
        if self._size and os.pread(self._file, 1, self._size - 1) != b"\n":
            os.write(self._file, b"\n")  # a line torn by a dead machine must not swallow the next one

    def _open(self) -> int:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise ConfigError(f"replay_log: {error}") from None

    def write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        try:
            if self._size and self._size + len(line) > self._most:
                self._rotate()
            os.write(self._file, line)
            self._size += len(line)
        except (OSError, ConfigError):
            self.dropped += 1

    def _rotate(self) -> None:
        for number in range(self._files - 1, 0, -1):
            older = Path(f"{self.path}.{number}")
            if older.exists():
                older.replace(f"{self.path}.{number + 1}")
        self.path.replace(f"{self.path}.1")
        fresh = self._open()
        os.close(self._file)
        self._file, self._size = fresh, 0

    def close(self) -> None:
        os.close(self._file)


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The records of one log, in order; a torn line is left out.

    Raises:
        InputError: no such file, or a whole line that is no record of a schema we know.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the file that replay_log names") from None
    lines = text.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or record.get("schema") != "replay/1":
            raise InputError(f"{path}, line {number}: not a replay/1 record")
        yield record


def replay(records: Iterator[dict[str, Any]], policy: Policy) -> dict[str, Any]:
    """What another policy would have done with the same ratings, in the order they came.

    Returns:
        Counts of all and of rated requests; the share of the rated that the target answered, then and now; how many
        routes differ; the mean latency of each model in the log, and what the new routes would have taken by it.
    """
    n = rated = then = now = changed = 0
    times: dict[str, list[float]] = {"draft": [], "target": []}
    for record in records:
        n += 1
        if record["outcome"] == "ok" and record["route"] in times:
            times[record["route"]].append(record["total_ms"])
        if record["score"] is None or record["reason"] != "rating":
            continue
        rated += 1
        before = record["shadow"] or record["route"]
        rating = Rating(record["score"], record["draft_rating"], record["target_rating"])
        route = policy.decide(rating, key=record["request_id"]).route
        then, now, changed = then + (before == "target"), now + (route == "target"), changed + (before != route)
    mean = {role: sum(t) / len(t) if t else None for role, t in times.items()}
    ms = None
    if rated and mean["draft"] is not None and mean["target"] is not None:
        ms = (mean["draft"] * (rated - now) + mean["target"] * now) / rated
    return {
        "requests": n,
        "rated": rated,
        "target_share_then": then / rated if rated else None,
        "target_share_now": now / rated if rated else None,
        "changed": changed,
        "mean_ms_draft": mean["draft"],
        "mean_ms_target": mean["target"],
        "mean_ms_now": ms,
    }
