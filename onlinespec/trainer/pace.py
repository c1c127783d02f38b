"""How much may be trained now, and how much captured. Pure: times are passed in.

Training may use `duty_frac` of wall time: a bucket of training seconds fills at that rate, a step may start while
it is not in debt, and a step that took long is paid back before the next one. Not so what a compilation or a device's
warm-up took, which comes once and would stop training for its time over the duty: a step is charged for ten usual
ones at most. Training pauses while the server runs `busy_requests` or more. It is calm where the last
`_CALM_VERDICTS` candidates were all refused and nothing drifted meanwhile: then duty and the share of requests
captured fall to their calm shares. A promotion or drift ends the calm at once.
"""

import statistics
from collections import deque
from typing import Any, Literal

from onlinespec.config import PaceConfig

PaceState = Literal["waiting for requests", "training", "paused: busy", "paused: duty", "paused: calm"]

_CALM_VERDICTS = 3
_FIRST_CHARGE_S = 5.0
"""at most for a step before which there was none"""
_OUTLIER = 10.0
_USUAL_STEPS = 32
_BUCKET_S = 1.0
"""training seconds that may be saved up while there is nothing to train on"""


class Pace:
    """See the module's docstring. Any one monotonic clock in seconds."""

    def __init__(self, config: PaceConfig, now_s: float):
        self.state: PaceState = "waiting for requests"
        """what the last `may_step` found"""
        self._config = config
        self._updated_s = now_s
        self._balance_s = 0.0
        self._lately_s: deque[float] = deque(maxlen=_USUAL_STEPS)
        self._num_refused = 0
        """candidates refused since a promotion or drift"""

    @property
    def is_calm(self) -> bool:
        """Nothing has drifted, and candidates bring no gain."""
        return self._num_refused >= _CALM_VERDICTS

    @property
    def duty_frac(self) -> float:
        """Share of wall time that may go into steps now."""
        return self._config.duty_frac * (self._config.calm_duty_frac if self.is_calm else 1.0)

    @property
    def capture_frac(self) -> float:
        """Share of requests to capture now."""
        return self._config.calm_capture_frac if self.is_calm else 1.0

    def may_step(self, now_s: float, is_due: bool, running_requests: int) -> bool:
        """True where an optimizer step may start now. is_due: there is something to train on."""
        duty_frac = self.duty_frac
        self._balance_s = min(self._balance_s + duty_frac * (now_s - self._updated_s), _BUCKET_S)
        self._updated_s = now_s
        busy_requests = self._config.busy_requests
        if not is_due:
            self.state = "waiting for requests"
        elif busy_requests and running_requests >= busy_requests:
            self.state = "paused: busy"
        elif duty_frac < 1 and (self._balance_s < 0 or duty_frac == 0):
            self.state = "paused: calm" if self.is_calm else "paused: duty"
        else:
            self.state = "training"
        return self.state == "training"

    def stepped(self, seconds: float) -> None:
        """A step took so long."""
        most_s = _OUTLIER * statistics.median(self._lately_s) if self._lately_s else _FIRST_CHARGE_S
        self._balance_s -= min(seconds, most_s)
        self._lately_s.append(seconds)

    def judged(self, is_promoted: bool) -> None:
        """A candidate's verdict came."""
        self._num_refused = 0 if is_promoted else self._num_refused + 1

    def drifted(self) -> None:
        """Traffic moved: what was refused before says nothing about now."""
        self._num_refused = 0

    def saved(self) -> dict[str, Any]:
        """What a restart should know; the bucket starts empty."""
        return {"num_refused": self._num_refused}

    def load_saved(self, saved: dict[str, Any]) -> None:
        self._num_refused = saved["num_refused"]
