"""The fuse: the one place inside the server where our exceptions end.

A fault is counted and logged once per kind. After `max_faults` the fuse opens: capture is off, the draft
stays, the server serves. After `retry_s` it is half-open: one clean pass closes it, one fault opens it again.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

logger = logging.getLogger(__name__)


class Fuse:
    """Runs our code for the server; see the module's docstring."""

    def __init__(self, max_faults: int, retry_s: float, clock: Callable[[], float] = time.monotonic):
        self.counters: Counter[str] = Counter()
        self.last_fault = ""
        self._max_faults = max_faults
        self._retry_s = retry_s
        self._clock = clock
        self._num_faults = 0
        self._opened_s: float | None = None

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        if self._opened_s is None:
            return "closed"
        return "half-open" if self._clock() - self._opened_s >= self._retry_s else "open"

    def run(self, function: Callable[..., Any], *args: Any, is_vital: bool = False, is_last: bool = False) -> Any:
        """Call it; None where it raised, or where the fuse is open and it is not vital.

        A pass is several calls; only the clean end of its last one closes a half-open fuse.

        Vital is what answers control requests: it runs while the fuse is open, and its faults are
        counted without opening it.
        """
        state = self.state
        if state == "open" and not is_vital:
            return None
        try:
            result = function(*args)
        except Exception as error:  # the house's only one: the server must not die of us
            self._fault(function, error, is_vital)
            return None
        if state == "half-open" and is_last:
            self._opened_s = None
            self._num_faults = 0
        return result

    def _fault(self, function: Callable[..., Any], error: Exception, is_vital: bool) -> None:
        kind = f"{getattr(function, '__qualname__', function)}: {type(error).__name__}"
        self.last_fault = f"{kind}: {error}"
        self.counters["faults"] += 1
        self.counters[f"fault {kind}"] += 1
        if self.counters[f"fault {kind}"] == 1:
            logger.error("onlinespec: %s (logged once per kind; the server goes on)", self.last_fault, exc_info=True)
        if is_vital:
            return
        self._num_faults += 1
        if self._num_faults >= self._max_faults:  # still so when half-open: only a clean pass forgets
            self._opened_s = self._clock()
            logger.error("onlinespec: fuse open after %d faults, capture is off", self._num_faults)
