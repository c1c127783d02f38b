"""When speculation pays: whether the server should draft at all at its present load. Pure: times are passed in.

At depth 0 a decode step commits one token a request and costs s_0 seconds; at depth K it commits the accept length
and costs s_K. So depth K is faster exactly where accept length exceeds the break-even s_K / s_0. All three are
measured: the costs from the server's own steps, apart for loads that differ by more than a factor of two (drafting
is nearly free for one request and dear for a full batch); the accept length by the shadow walk over captured rows,
which goes on at depth 0. Depth changes where accept length misses or beats the break-even by `hysteresis_frac`.

What cannot be seen from the present depth is the cost of the other one. A probe runs `probe_steps` decode steps there
and measures it anew, what was known before forgotten. It is asked for

- where the other cost is not known at this load;
- before every change: a change rests on a cost measured within `probe_every_s`, or a machine that is slow for all
  would look like a draft that is slow;
- at depth 0, every `probe_every_s`, since nothing else would tell that a draft which was slow is so no more. Not while
  accept length is below 1 + hysteresis_frac: drafting is not free, so it could not pay whatever it costs.

What probing costs. With steps of s seconds probes take probe_steps * s / probe_every_s of the time; where that is
more than `probe_frac`, the next one waits for what the last took divided by `probe_frac`, so that it is the bound at
any speed. Of that time only the part is lost by which the other depth is slower: with a draft that is quick and
nearly useless (break-even 1.3, accept length 1.15), 16 steps of 10 ms every 30 s are 0.5 % of the time and lose
0.06 %. At depth K a probe comes only when a cost is unknown, aged out or about to decide. The server counts a probe's
steps itself and returns; what it could not time of them is asked for again at the next look.

Another draft in service, or drift, is news: neither the time since the last probe nor that since the last change is
waited for then, so each may cost one probe and one change more.

How long a return takes. Once the draft in service pays again, the next probe begins within max(probe_every_s, last
probe's time / probe_frac), lasts `probe_steps` steps, and decides alone; the dwell time since the last change must
have passed. So: that maximum, plus the probe, plus a look.

It does not flip without end: two changes lie at least `min_dwell_s` apart, twice as long after each that came within
four such times of the one before, up to `max_dwell_s`. So noise at the break-even changes depth a few times and then
seldom, and one that came after a long rest is answered at once. Not claimed: that the fastest depth is found among
others than 0 and K, that tail latency is best where throughput is, or that the load is the same at both depths (a
faster server runs fewer requests at a time).
"""

import math
from dataclasses import dataclass

from onlinespec.config import FloorConfig

_RESTS = 4.0
"""dwell times after which a change is no longer one of a series"""


@dataclass(frozen=True)
class WantedDepth:
    """What the server should run now. num_steps: decode steps after which it returns by itself; None: until told."""

    depth: int
    reason: str
    num_steps: int | None = None


@dataclass(frozen=True)
class FloorFigures:
    """For people. None: not measured at this load, or not lately."""

    accept_length: float | None
    break_even: float | None
    zero_step_s: float | None
    full_step_s: float | None


def load_bucket(running_requests: float) -> int:
    """Loads that share a cost: 1, 2, 3-4, 5-8, ... running requests are 0, 1, 2, 3, ..."""
    return (max(math.ceil(running_requests), 1) - 1).bit_length()


@dataclass
class _Window:
    """A ratio of two sums, out of which newer counts push older ones. num_seen: counts ever taken."""

    total: float = 0.0
    count: float = 0.0
    num_seen: int = 0
    updated_s: float = 0.0

    def add(self, total: float, count: int, window: int) -> None:
        kept = math.exp(-count / window)
        self.total = kept * self.total + total
        self.count = kept * self.count + count
        self.num_seen += count

    def ratio(self, min_count: int) -> float | None:
        """None where fewer counts than that were taken."""
        return self.total / self.count if self.num_seen >= min_count else None


@dataclass
class _Probe:
    started_s: float
    steps: int = 0
    wall_s: float = 0.0


class Floor:
    """Depth 0 or K, and why. `num_draft_steps`: K. `starts_at_zero`: the draft is fresh and has nothing to show yet.

    Every time is seconds of one monotonic clock. Memory: two numbers per depth and load.
    """

    def __init__(self, config: FloorConfig, num_draft_steps: int, *, starts_at_zero: bool = False):
        assert num_draft_steps >= 1, num_draft_steps
        self.depth = 0 if starts_at_zero else num_draft_steps
        """wanted, probes apart"""
        self.num_changes = 0
        self.num_probes = 0
        self._config = config
        self._num_draft_steps = num_draft_steps
        self._costs: dict[tuple[int, int], _Window] = {}
        self._accept = _Window()
        self._probe: _Probe | None = None
        self._next_probe_s = -math.inf
        self._changed_s = -math.inf
        self._dwell_s = config.min_dwell_s

    def observe_cost(self, depth: int, running_requests: float, num_steps: int, wall_s: float, *, now_s: float) -> None:
        """Take decode steps run since the last look at one depth and load. Other depths than 0 and K are passed over.

        wall_s: time in those steps alone, idle time left out.
        """
        if depth not in (0, self._num_draft_steps) or num_steps <= 0 or wall_s <= 0.0:
            return
        cost = self._costs.setdefault((depth, load_bucket(running_requests)), _Window())
        cost.add(wall_s, num_steps, self._config.cost_window_steps)
        cost.updated_s = now_s
        if self._probe is not None and depth != self.depth:
            self._probe.steps += num_steps
            self._probe.wall_s += wall_s

    def observe_accept(self, num_tokens: int, num_steps: int) -> None:
        """Take the incumbent's walk at depth K over a held-out request: tokens committed over verify steps."""
        self._accept.add(num_tokens, num_steps, self._config.accept_window_steps)

    def forget_accept(self) -> None:
        """Another draft is in service, or other traffic: what was accepted says nothing of it; costs stay. A probe or a
        change that it asks for waits for none before it."""
        self._accept = _Window()
        self._next_probe_s = self._changed_s = -math.inf

    def figures(self, running_requests: float, now_s: float) -> FloorFigures:
        """What a decision would rest on at this load."""
        zero_s = self._step_s(0, running_requests, now_s)
        full_s = self._step_s(self._num_draft_steps, running_requests, now_s)
        return FloorFigures(
            self._accept.ratio(self._config.min_accept_steps),
            full_s / zero_s if full_s and zero_s else None,
            zero_s,
            full_s,
        )

    def decide(self, running_requests: float, now_s: float) -> WantedDepth:
        """Say what depth the server should run, at every look. running_requests: now; 0 keeps all as it is."""
        if running_requests <= 0:
            return WantedDepth(self.depth, "no request runs")
        figures = self.figures(running_requests, now_s)
        if self._probe is not None:
            left = self._config.probe_steps - self._probe.steps
            is_refused = not self._probe.steps and now_s - self._probe.started_s > self._config.probe_every_s
            if left > 0 and not is_refused:
                return WantedDepth(self._other, f"probing what depth {self._other} costs", left)
            self._end_probe(now_s)
        is_due = now_s - self._changed_s >= self._dwell_s and self._is_change_due(figures)
        if is_due and self._is_fresh(running_requests, now_s):
            self._change(now_s)
        elif self._wants_probe(figures, is_due, running_requests, now_s):
            self._start_probe(running_requests, now_s)
            return WantedDepth(self._other, f"probing what depth {self._other} costs", self._config.probe_steps)
        return WantedDepth(self.depth, self._reason(figures))

    @property
    def _other(self) -> int:
        return 0 if self.depth else self._num_draft_steps

    def _step_s(self, depth: int, running_requests: float, now_s: float) -> float | None:
        """Seconds per decode step; None where too few were seen lately."""
        cost = self._costs.get((depth, load_bucket(running_requests)))
        if cost is None or now_s - cost.updated_s > self._config.cost_max_age_s:
            return None
        return cost.ratio(self._config.min_cost_steps)

    def _is_change_due(self, figures: FloorFigures) -> bool:
        if figures.accept_length is None or figures.break_even is None:
            return False
        ratio = figures.accept_length / figures.break_even
        slack = self._config.hysteresis_frac
        return ratio < 1.0 - slack if self.depth else ratio > 1.0 + slack

    def _change(self, now_s: float) -> None:
        is_quick = now_s - self._changed_s < _RESTS * self._dwell_s
        self._dwell_s = min(2.0 * self._dwell_s, self._config.max_dwell_s) if is_quick else self._config.min_dwell_s
        self._changed_s = now_s
        self.depth = self._other
        self.num_changes += 1

    def _is_fresh(self, running_requests: float, now_s: float) -> bool:
        """The other depth's cost at this load was measured within `probe_every_s`."""
        cost = self._costs.get((self._other, load_bucket(running_requests)))
        return cost is not None and now_s - cost.updated_s <= self._config.probe_every_s

    def _wants_probe(self, figures: FloorFigures, is_due: bool, running_requests: float, now_s: float) -> bool:
        if figures.accept_length is None or now_s < self._next_probe_s:
            return False
        if self.depth:
            is_stale = is_due and not self._is_fresh(running_requests, now_s)
            return figures.full_step_s is not None and (figures.zero_step_s is None or is_stale)
        could_pay = figures.accept_length > 1.0 + self._config.hysteresis_frac
        is_old = figures.full_step_s is None or not self._is_fresh(running_requests, now_s)
        return could_pay and is_old and figures.zero_step_s is not None

    def _start_probe(self, running_requests: float, now_s: float) -> None:
        self._costs.pop((self._other, load_bucket(running_requests)), None)
        self._probe = _Probe(now_s)
        self.num_probes += 1

    def _end_probe(self, now_s: float) -> None:
        assert self._probe is not None
        started_s = self._probe.started_s if self._probe.steps else now_s
        self._next_probe_s = started_s + max(self._config.probe_every_s, self._probe.wall_s / self._config.probe_frac)
        self._probe = None

    def _reason(self, figures: FloorFigures) -> str:
        if figures.accept_length is None:
            return f"depth {self.depth} is kept: the shadow accept length is not known yet"
        if figures.break_even is None:
            return f"depth {self.depth} is kept: the break-even at this load is not measured yet"
        verb = "speculation pays" if figures.accept_length > figures.break_even else "speculation does not pay"
        return (
            f"depth {self.depth}: {verb}, accept length {figures.accept_length:.2f} against a break-even of"
            f" {figures.break_even:.2f}"
        )
