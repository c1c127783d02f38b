"""Sets the server's draft depth by measured cost: feeds the floor from heartbeats and walks, and carries out its word.

A server that restarts drafts at full depth again, and so does this; beside one that runs on, it goes on where that
stands.
"""

import re
import time
from collections.abc import Mapping

from onlinespec.config import FloorConfig
from onlinespec.errors import SwapError
from onlinespec.gate.floor import Floor, WantedDepth
from onlinespec.versions.journal import DepthChanged, Journal
from onlinespec.wire.messages import Hello, SetDepth
from onlinespec.wire.sockets import ControlClient

_UNTIMED_STEPS = 8
"""more than a probe asks for: steps at its ends and beside a prefill are not timed"""
_COST = re.compile(r"decode_steps_d(\d+)_b(\d+)")


class DepthKeeper:
    """See the module's docstring. starts_at_zero: the draft is fresh, and drafts nothing until it pays."""

    def __init__(
        self, config: FloorConfig, hello: Hello, control: ControlClient, journal: Journal, *, starts_at_zero: bool
    ):
        self.is_on = config.enabled and not hello.depth_refused
        self.wanted: WantedDepth | None = None
        """what the floor said last; None before its first word, or where it is off"""
        self._control = control
        self._journal = journal
        self._num_draft_steps = hello.num_draft_steps
        self.num_steps = hello.depth
        """the server's depth, probes apart"""
        self._is_probing = False
        """the server holds another depth for some steps, or has held it and was told nothing since"""
        is_at_zero = starts_at_zero or hello.depth == 0  # a sidecar before this one left it there
        self._floor = Floor(config, hello.num_draft_steps, starts_at_zero=is_at_zero)
        self._costs: dict[tuple[int, int], tuple[int, int]] = {}
        self._has_looked = False

    def costs(self, counters: Mapping[str, int], now_s: float) -> None:
        """Take a heartbeat's counters: decode steps and microseconds since the server's start, by depth and load."""
        for name in counters:
            if not (found := _COST.fullmatch(name)):
                continue
            key = depth, load = int(found[1]), int(found[2])
            steps, wall_us = counters[name], counters.get(f"decode_us_d{depth}_b{load}", 0)
            # What was counted before the first look may be of any age; a depth that appears later began after it.
            steps_before, us_before = self._costs.get(key, (0, 0) if self._has_looked else (steps, wall_us))
            self._costs[key] = steps, wall_us
            self._floor.observe_cost(depth, load, steps - steps_before, (wall_us - us_before) * 1e-6, now_s=now_s)
        self._has_looked = True

    def settle(self) -> int:
        """End a probe, and return the depth that requests are served at."""
        if self._is_probing:
            self._set(self.num_steps)
        return self.num_steps

    def accepted(self, num_tokens: int, num_steps: int) -> None:
        """Take the incumbent's walk over a held-out request."""
        self._floor.observe_accept(num_tokens, num_steps)

    def forget_accept(self) -> None:
        """Another draft is in service, or acceptance fell."""
        self._floor.forget_accept()

    def keep(self, running_requests: int, now_s: float) -> None:
        """At every look while no switchback runs, set what the floor wants. Raises: SwapError where it is refused."""
        if not self.is_on:
            return
        self.wanted = wanted = self._floor.decide(running_requests, now_s)
        if wanted.num_steps is not None:
            self._set(wanted.depth, wanted.num_steps + _UNTIMED_STEPS)
            return
        is_change = wanted.depth != self.num_steps
        if is_change or self._is_probing:
            self._set(wanted.depth)
        if is_change:
            event = DepthChanged(time_s=time.time(), num_steps=wanted.depth, by="floor", reason=wanted.reason)
            self._journal.append(event)

    def _set(self, num_steps: int, for_steps: int = 0) -> None:
        ack = self._control.acknowledged(SetDepth(num_steps, for_steps))
        if not ack.is_ok:
            raise SwapError(f"the server refused draft depth {num_steps}: {ack.message}")
        self._is_probing = for_steps > 0
        if not for_steps:
            self.num_steps = num_steps
