"""How a process beside the server steps back for it: it runs on what processor time the server leaves.

A nice value weighs a process against others of its group. A Linux with autogroups makes a group of every session, and
`serve` starts server and sidecar in sessions of their own: there the value of the whole group says it, or the two
share the processor evenly whatever their nice values are.

Source: sched(7), "The autogroup feature" and "The nice value and group scheduling".
"""

import os
import time
from pathlib import Path

_NICE = 10
_AUTOGROUP = Path("/proc/self/autogroup")
_TRIES = 5
_PAUSE_S = 0.2
"""Linux takes one such change in a tenth of a second from all who are not root"""


def step_back() -> None:
    """Lower the priority of this process and of its session."""
    os.nice(_NICE)
    for _ in range(_TRIES if _AUTOGROUP.exists() else 0):
        try:
            _AUTOGROUP.write_text(str(_NICE))
            return
        except BlockingIOError:
            time.sleep(_PAUSE_S)
        except OSError:
            return  # not ours to set, or no such feature: nice alone has to do
