"""One candidate against the incumbent on the same held-out requests, until one of them has won.

Held out: nothing has trained on the request's conversation when it judges (`sides`).

A request's difference is the mean accept length the candidate would have had on it minus the incumbent's, both
walked over the same captured rows. It counts for at most `gain_clip_tokens` either way: what is shown is the mean of
differences so limited. A proof about differences that may be as large as the depth asks three times the requests (five
at depth 5), all of them against the chance of a rare loss that was never seen; such losses are what the slices, the
trial and the guard are for. Only requests that began after the candidate's weights were frozen count:
earlier ones may have shaped them. An answer that training has seen does not count. And a conversation counts once:
its turns share what makes them easy or hard, the e-process takes differences for news, and ten turns each of such
conversations would promote noise one time in three (`benchmarks/bench_gate.py`). None of these rules looks at the
difference itself, so none can tilt the test.

A promotion wants the main test rejected, every large slice proven (`slices`), enough requests, and enough time
between the first and the last of them. That time is between their *starts*: a burst that came at once is one burst
however long the server took to answer it. Where the main test has passed and the rest has not, the race goes on.

Dropping is always allowed, so its rules are there for speed alone. They are lenient where luck decides: a gain of
0.05 tokens at the usual spread of 0.22 asks about 300 requests, and rules that believe the first 24 would drop it
nearly always.

Memory: one set entry per admitted request, at most a few more than `max_requests`; slices have a bound of their
own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from onlinespec.config import GateConfig
from onlinespec.gate.eprocess import Numbers, build_test
from onlinespec.gate.slices import Slices
from onlinespec.gate.verdict import FIDELITIES, Fidelity, Verdict, Walked

AnswerKey = tuple[int, ...]
_STALL_ERRORS = 1.5
"""standard errors by which a pace is taken for better than it was"""
_WINDOWS = 8
"""parts of the requests a race may take; the pace of one is not judged by fewer"""


def _never(answer_key: AnswerKey) -> bool:
    return False


def is_futile(
    num_requests: int, sum_gain: Numbers, sum_squares: Numbers, config: GateConfig
) -> npt.NDArray[np.bool_] | np.bool_:
    """The mean gain lies below what is wanted by a standard error: this is not worth more requests.

    Units: sums of gains and of their squares, in tokens. Shapes: none for one race, [S] for S of them.
    """
    mean = sum_gain / num_requests
    error = np.sqrt(np.maximum(sum_squares / num_requests - mean * mean, 0.0) / num_requests)
    is_late = num_requests >= config.futility_requests
    return np.logical_and(is_late, mean + error <= config.min_gain_tokens)


def _hoped_pace(increments: Sequence[float]) -> float:
    """Mean increment, taken for better by `_STALL_ERRORS` standard errors."""
    return float(np.mean(increments) + _STALL_ERRORS * np.std(increments) / math.sqrt(len(increments)))


class Race:
    """Evidence for one candidate, request by request. After its verdict a race takes no more.

    num_draft_steps: the largest difference there is. `alpha` is this candidate's own level (see `budget`).
    `frozen_at_s` must be read from the clock that stamps `Sample.started_s`, the server's. `was_trained_on` says
    whether training has seen an answer.
    """

    def __init__(
        self,
        candidate_id: str,
        incumbent_id: str,
        num_draft_steps: int,
        alpha: float,
        config: GateConfig,
        *,
        frozen_at_s: float,
        was_trained_on: Callable[[AnswerKey], bool] = _never,
    ):
        assert 0.0 < alpha < 1.0, alpha
        self.candidate_id = candidate_id
        self.incumbent_id = incumbent_id
        self.alpha = alpha
        self.frozen_at_s = frozen_at_s
        self.verdict: Verdict | None = None
        self.num_requests = 0
        self.num_dropped_early = 0
        self.num_dropped_duplicates = 0
        self.num_dropped_trained = 0
        self.num_dropped_empty = 0
        self.fidelity: dict[Fidelity, int] = dict.fromkeys(FIDELITIES, 0)
        self._config = config
        self._was_trained_on = was_trained_on
        self._increments: list[float] = []
        """of the logarithm of the wealth, by request"""
        self._num_draft_steps = num_draft_steps
        bound = min(float(num_draft_steps), config.gain_clip_tokens)
        self._evidence = build_test(config.test, bound, config.min_gain_tokens)
        self._slices = Slices(bound, config)
        self._admitted: set[bytes] = set()
        self._observed: set[bytes] = set()
        self._sum_gain = 0.0
        self._sum_gain_squares = 0.0
        self._incumbent = Walked()
        self._candidate = Walked()
        self._starts_s = (math.inf, -math.inf)
        """first and last start of a request that counted"""

    @property
    def e_value(self) -> float:
        return self._evidence.e_value

    @property
    def has_passed(self) -> bool:
        """The main test stands rejected; slices, span or number of requests may still be wanting."""
        return bool(self._evidence.has_rejected(self.alpha))

    @property
    def span_s(self) -> float:
        return max(self._starts_s[1] - self._starts_s[0], 0.0)

    @property
    def is_of_the_past(self) -> bool:
        """Asked where acceptance fell: it rests on enough requests from before to be won on them."""
        return self.num_requests >= self._config.stall_requests and not self.has_passed

    def is_stalled(self, within_requests: int) -> bool:
        """Even at a hopeful reading of its pace the race would not be won within so many requests from its start.

        The pace of the whole race (there is little gain) and that of its last requests (the traffic moved on): at least
        `stall_requests` of them, more where there is more time, since every look is a chance to drop a small gain.
        A reason to make room for a newer candidate, never one to promote: dropping is always allowed.
        """
        window = max(self._config.stall_requests, within_requests // _WINDOWS)
        if len(self._increments) < window or self.has_passed:
            return False
        pace = min(_hoped_pace(self._increments), _hoped_pace(self._increments[-window:]))
        missing = -math.log(self.alpha) - float(self._evidence.log_wealth)
        return pace * max(within_requests - self.num_requests, window) < missing

    @property
    def mean_gain_tokens(self) -> float:
        """Mean difference so far; 0.0 before the first request."""
        return self._sum_gain / max(self.num_requests, 1)

    def admits(self, sample_started_s: float, group: bytes, answer_key: AnswerKey) -> bool:
        """Decide whether a held-out request may count, before anyone pays for its walks.

        An admitted conversation is remembered and refused from then on. Every refusal is counted under its
        cause.
        """
        if sample_started_s <= self.frozen_at_s:
            self.num_dropped_early += 1
            return False
        if group in self._admitted:
            self.num_dropped_duplicates += 1
            return False
        if self._was_trained_on(answer_key):
            self.num_dropped_trained += 1
            return False
        self._admitted.add(group)
        return True

    def observe(
        self,
        request: int,
        incumbent: Walked,
        candidate: Walked,
        group: bytes,
        *,
        started_s: float,
        now_s: float,
        fidelity: Fidelity,
        slices: Mapping[str, str],
    ) -> Verdict | None:
        """Take the two walks of one admitted request; return the verdict where this one decides.

        A walk without a step (an answer of one token) is counted and otherwise ignored. started_s: as `admits` had it.
        slices: the request's label in each dimension, as `slice_labels` gives them.
        """
        assert self.verdict is None, "the race is over"
        assert group in self._admitted, f"request {request} was not admitted"
        assert group not in self._observed, f"request {request} comes after another of its conversation"
        self._observed.add(group)
        if not incumbent.steps or not candidate.steps:
            self.num_dropped_empty += 1
            return None
        gain = candidate.accept_length - incumbent.accept_length
        before = float(self._evidence.log_wealth)
        self._evidence.observe(gain)
        self._increments.append(float(self._evidence.log_wealth) - before)
        self._slices.observe(slices, gain, incumbent, candidate)
        self.num_requests += 1
        self.fidelity[fidelity] += 1
        self._starts_s = (min(self._starts_s[0], started_s), max(self._starts_s[1], started_s))
        self._sum_gain += gain
        self._sum_gain_squares += gain * gain
        self._incumbent += incumbent
        self._candidate += candidate
        self.verdict = self._decide(now_s)
        return self.verdict

    def withdraw(self, reason: str, *, now_s: float) -> Verdict:
        """End the race from outside: the incumbent changed, traffic dried up, the process stops."""
        assert self.verdict is None, "the race is over"
        self.verdict = self._verdict("drop", reason, now_s)
        return self.verdict

    def _decide(self, now_s: float) -> Verdict | None:
        """First rule that applies; None while the race goes on."""
        config = self._config
        wanted = f"{config.min_gain_tokens:g}"
        said = f"a mean gain of {self.mean_gain_tokens:+.3f} tokens over {self.num_requests} held-out requests"
        if harmed := self._slices.harmed:
            return self._verdict("drop", f"{harmed} loses more than {config.slice_tolerance_tokens:g}", now_s)
        unproven = self._slices.unproven
        is_enough = self.num_requests >= config.min_requests and self.span_s >= config.min_span_s
        if self.has_passed and is_enough and unproven is None:
            return self._verdict("promote", f"{said} shows more than {wanted}", now_s)
        if is_futile(self.num_requests, self._sum_gain, self._sum_gain_squares, config):
            return self._verdict("drop", f"{said} is not above {wanted}", now_s)
        if self.num_requests < config.max_requests:
            return None
        if not self.has_passed:
            return self._verdict("drop", f"{said} leaves open whether it exceeds {wanted}", now_s)
        if unproven is not None:
            open_part = f"{unproven} loses less than {config.slice_tolerance_tokens:g}"
            return self._verdict("drop", f"{said} leaves open whether {open_part}", now_s)
        return self._verdict("drop", f"{said} came within {self.span_s:.1f} s, wanted {config.min_span_s:g}", now_s)

    def _interval(self) -> tuple[float, float]:
        """95 % normal approximation; the whole range of differences below two requests."""
        bound = float(self._num_draft_steps)
        if self.num_requests < 2:
            return (-bound, bound)
        mean = self.mean_gain_tokens
        spread = max(self._sum_gain_squares - self.num_requests * mean * mean, 0.0)
        half = 1.96 * math.sqrt(spread / (self.num_requests - 1) / self.num_requests)
        return (max(mean - half, -bound), min(mean + half, bound))

    def _verdict(self, decision: Literal["promote", "drop"], reason: str, now_s: float) -> Verdict:
        return Verdict(
            decision=decision,
            reason=reason,
            candidate_id=self.candidate_id,
            incumbent_id=self.incumbent_id,
            num_requests=self.num_requests,
            span_s=self.span_s,
            mean_gain_tokens=self.mean_gain_tokens,
            interval_tokens=self._interval(),
            test=self._config.test,
            e_value=self.e_value,
            threshold=1.0 / self.alpha,
            alpha=self.alpha,
            accept_length_incumbent=self._incumbent.accept_length,
            accept_length_candidate=self._candidate.accept_length,
            incumbent=self._incumbent,
            candidate=self._candidate,
            slices=self._slices.results(),
            fidelity=dict(self.fidelity),
            num_dropped_early=self.num_dropped_early,
            num_dropped_duplicates=self.num_dropped_duplicates,
            num_dropped_trained=self.num_dropped_trained,
            num_dropped_empty=self.num_dropped_empty,
            frozen_at_s=self.frozen_at_s,
            decided_at_s=now_s,
        )
