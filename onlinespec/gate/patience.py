"""How many requests a race may be expected to take before it makes room for a newer candidate.

After a shift each candidate is much better than the one before, and a race that goes on for a small gain keeps them
from service; late in training a gain of 0.05 tokens asks hundreds of requests, and a race that is cut short shows
nothing. No one number serves both. So it starts small, doubles with every race that was cut short, and starts again
when one was won quickly or acceptance fell: towards a need that stays the same, doubling wastes at most a constant
multiple of it in requests, and the level of each race that was cut short. A race is cut short only where a newer
candidate waits and may be judged, and dropping is always allowed, so none of this can tilt the test.
"""

import math

from onlinespec.config import GateConfig


class Patience:
    """requests: the number as it stands, for a race at the level `alpha` of the config; what another needs goes with
    the logarithm of its level."""

    def __init__(self, config: GateConfig):
        self._alpha = config.alpha
        self._most = config.max_requests
        self._first = min(config.patience_requests, config.max_requests)
        self.requests = self._first

    def within(self, alpha: float) -> int:
        """Requests within which a race at this level must promise a promotion."""
        return min(round(self.requests * math.log(alpha) / math.log(self._alpha)), self._most)

    def cut_short(self) -> None:
        """A race had no pace to be won within so many requests, and a newer candidate took its place."""
        self.requests = min(2 * self.requests, self._most)

    def promoted(self, num_requests: int) -> None:
        """A race was won after so many requests: the next may be as quick."""
        self.requests = max(self._first, min(self.requests, 2 * num_requests))

    def drifted(self) -> None:
        """Acceptance fell: what training gains now is large again."""
        self.requests = self._first
