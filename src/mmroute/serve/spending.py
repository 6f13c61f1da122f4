"""What was spent in the last hour, in minutes: a cap on dollars asks it before each decision."""

import time
from collections import deque
from collections.abc import Callable

__all__ = ["Spending"]

_MINUTE_S, _MINUTES = 60, 60


class Spending:
    """A sliding hour, so that no hour holds more than a cap, as two neighbouring full buckets would."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._minutes: deque[tuple[int, float]] = deque()

    def add(self, usd: float) -> None:
        minute = int(self._clock() // _MINUTE_S)
        before = self._minutes.pop()[1] if self._minutes and self._minutes[-1][0] == minute else 0.0
        self._minutes.append((minute, before + usd))

    @property
    def last_hour(self) -> float:
        """USD of the minute that runs and the sixty before it."""
        first = int(self._clock() // _MINUTE_S) - _MINUTES
        while self._minutes and self._minutes[0][0] < first:
            self._minutes.popleft()
        return sum(usd for _, usd in self._minutes)
