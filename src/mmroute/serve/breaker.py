"""When a server is left alone for a while: a circuit breaker, the hold of a 429, and the budget of retries."""

import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from mmroute.serve.settings import Circuit

__all__ = ["Breaker", "RetryBudget"]

_WINDOW_S = 30
_CLOSES_AFTER = 2


class Breaker:
    """Opens after failures in a row, or when half of the last 30 s' calls failed; lets one probe at a time through."""

    def __init__(self, settings: Circuit, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings, self._clock = settings, clock
        self.state: Literal["closed", "open", "half"] = "closed"
        self.held_until = 0.0
        """A 429's Retry-After: no call before it, and no failure either."""
        self._row = self._good = 0
        self._wait = settings.open_s
        self._until = 0.0
        self._probing = False
        self._recent: deque[tuple[float, bool]] = deque()

    @property
    def available(self) -> bool:
        """Whether a call would be let through now."""
        now = self._clock()
        if now < self.held_until:
            return False
        return self.state == "closed" or (now >= self._until and not self._probing)

    @property
    def wait(self) -> float:
        """Seconds until a call may be let through."""
        return max(0.0, self.held_until - self._clock(), self._until - self._clock() if self.state != "closed" else 0.0)

    def enter(self) -> bool:
        """Asks for one call; True must be followed by one of `good`, `bad`, `leave`."""
        if not self.available:
            return False
        if self.state != "closed":
            self.state, self._probing = "half", True
        return True

    def leave(self) -> None:
        """The call ended without telling anything: cancelled, or refused for the request's own sake."""
        self._probing = False

    def good(self) -> None:
        self._probing, self._row = False, 0
        self._note(True)
        if self.state != "closed":
            self._good += 1
            if self._good >= _CLOSES_AFTER:
                self.state, self._good, self._wait = "closed", 0, self.settings.open_s
                self._recent.clear()

    def bad(self) -> None:
        self._probing, self._good = False, 0
        self._row += 1
        self._note(False)
        failed = sum(not ok for _, ok in self._recent)
        if self.state == "half":
            self._wait = min(2 * self._wait, self.settings.open_cap_s)
            self._open()
        elif self.state == "closed" and (
            self._row >= self.settings.failures
            or (len(self._recent) >= self.settings.window_calls and 2 * failed >= len(self._recent))
        ):
            self._open()

    def hold(self, seconds: float) -> None:
        self.held_until = max(self.held_until, self._clock() + seconds)

    def _open(self) -> None:
        self.state, self._until = "open", self._clock() + self._wait

    def _note(self, ok: bool) -> None:
        now = self._clock()
        self._recent.append((now, ok))
        while self._recent and self._recent[0][0] < now - _WINDOW_S:
            self._recent.popleft()


class RetryBudget:
    """Retries are at most a share of the requests of the last 10 s, so that a failing server is not flooded by us."""

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._share, self._clock = share, clock
        self._requests: deque[float] = deque()
        self._retries: deque[float] = deque()

    def request(self) -> None:
        self._requests.append(self._clock())

    def take(self) -> bool:
        """Whether one more retry is within the budget; small traffic always has three."""
        since = self._clock() - 10
        for times in (self._requests, self._retries):
            while times and times[0] < since:
                times.popleft()
        if len(self._retries) >= max(3, self._share * len(self._requests)):
            return False
        self._retries.append(self._clock())
        return True
