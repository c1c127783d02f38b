"""How many requests a race may be expected to take before it makes room for a newer candidate.

After a shift each candidate is much better than the one before, and a race that goes on for a small gain keeps them
from service; late in training a gain of 0.05 tokens asks hundreds of requests, and a race that is cut short shows
nothing. No one number serves both. So it starts small, doubles with every race that was cut short for want of pace,
and starts again when a promotion came quickly or the traffic drifted: as with restarts of a search whose length
nobody knows, doubling costs a constant factor over the best fixed number. A race is cut short only where a newer
candidate waits, and dropping is always allowed, so none of this can tilt the test.

Source: Luby, Sinclair and Zuckerman 1993, "Optimal speedup of Las Vegas algorithms" (restarts of unknown length).
"""

from onlinespec.config import GateConfig


class Patience:
    """`requests` is the number as it stands, from `patience_requests` to `max_requests` of the config."""

    def __init__(self, config: GateConfig):
        self._most = config.max_requests
        self._first = min(config.patience_requests, config.max_requests)
        self.requests = self._first

    def cut_short(self) -> None:
        """A race had no pace to be won within so many requests, and a newer candidate took its place."""
        self.requests = min(2 * self.requests, self._most)

    def promoted(self, num_requests: int) -> None:
        """A race was won after so many requests: the next may be as quick."""
        self.requests = max(self._first, min(self.requests, 2 * num_requests))

    def drifted(self) -> None:
        """Acceptance fell: what training gains now is large again."""
        self.requests = self._first
