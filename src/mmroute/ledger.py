"""What each conversation of a batch took part in, call by call, and the trace of one of them alone.

Columns of a batch hold padding that is not a conversation's own, and rows leave it one by one. A ledger knows both, so
a conversation's trace is the one that it would have alone.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmroute.trace import Call, HopClose, Shape, Trace

__all__ = ["Ledger"]


class Ledger:
    """Of one session; conversations go by their first index in the batch."""

    def __init__(self) -> None:
        self.replayed: dict[int, list[dict[str, Any]]] = {}
        """By conversation: the image tokens that were shown again, as a trace records them."""
        self._calls: list[tuple[Call, list[int]]] = []
        """Every forward call with the conversations that took part."""
        self._closes: list[tuple[HopClose, list[int]]] = []
        self._padding: dict[int, list[int]] = {}
        """By conversation: columns of the batch that hold nothing of it, ascending."""

    @property
    def last(self) -> Call:
        """The last forward call."""
        return self._calls[-1][0]

    def call(self, call: Call, rows: Sequence[int]) -> None:
        """Notes a forward call.

        Args:
            call: as the cache's trace has it.
            rows: [row]: conversations that took part; several rows of one where it has beams.
        """
        self._calls.append((call, list(rows)))

    def close(self, close: HopClose, rows: Sequence[int]) -> None:
        """Notes a compression; arguments as in `call`."""
        self._closes.append((close, list(rows)))

    def entered(self, rows: Sequence[int], start: int, mask: Sequence[Sequence[int]]) -> None:
        """Notes which of the columns that were entered are padding: those where none of a conversation's rows stands.

        Args:
            rows: [row]: conversations, as in `call`.
            start: the first of these columns.
            mask: [row][column]: whether something of the row stands there.
        """
        own: dict[int, list[int]] = {}
        for conversation, real in zip(rows, mask, strict=True):
            own[conversation] = [max(pair) for pair in zip(own.get(conversation, real), real, strict=True)]
        for conversation, real in own.items():
            pads = self._padding.setdefault(conversation, [])
            pads.extend(start + i for i, value in enumerate(real) if not value)

    def replay(self, conversation: int, hop: int, columns: Sequence[int]) -> None:
        """Notes image tokens that are shown again in a hop, by their columns in the batch."""
        own = [self._own(conversation, column) for column in columns]
        self.replayed.setdefault(conversation, []).append({"hop": hop, "row": 0, "columns": own})

    def _own(self, conversation: int, column: int) -> int:
        """The column counted in the conversation's own positions."""
        return column - bisect_left(self._padding[conversation], column)

    def trace_of(self, conversation: int, shape: Shape, full: bool) -> Trace:
        """The trace of one conversation alone: its columns count its own positions, padding left out.

        Args:
            conversation: which.
            shape: of the model.
            full: whether calls record which positions ran.
        """

        def own(column: int) -> int:
            return self._own(conversation, column)

        calls: list[Call] = []
        so_far = [0]  # calls of this conversation among the first ones of the batch
        for batch_call, rows in self._calls:
            for here in (i for i, row in enumerate(rows) if row == conversation):  # several where it has beams
                call = batch_call.row(here)
                if not any(call.new[0]):
                    continue  # another row's picture or latent step brought this one nothing
                calls.append(call.moved(own))
            so_far.append(len(calls))
        closes = [
            close.row(rows.index(conversation)).moved(own) for close, rows in self._closes if conversation in rows
        ]
        closes = [replace(close, at_call=so_far[close.at_call]) for close in closes if close.hop[0] >= 0]
        return Trace(shape, calls, closes, self.replayed.get(conversation, []), full=full)
