"""One candidate against the incumbent on the same held-out requests, until one of them has won.

A request's difference is the mean accept length the candidate would have had on it minus the
incumbent's, both walked over the same captured rows. Only requests that began after the candidate's
weights were frozen count: earlier ones may have shaped them. An answer that training has seen does not
count. And a conversation counts once: its turns share what makes them easy or hard, the e-process takes
differences for news, and ten turns each of such conversations would promote noise one time in three
(`tests/gate/measure_power.py`). None of these rules looks at the difference itself, so none can tilt
the test.

Memory: one set entry per admitted request, at most a few more than `max_requests`.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Literal

from onlinespec.config import GateConfig
from onlinespec.gate.eprocess import EProcess
from onlinespec.gate.verdict import Verdict

AnswerKey = tuple[int, ...]


def _never(answer_key: AnswerKey) -> bool:
    return False


class Race:
    """Evidence for one candidate, request by request. After its verdict a race takes no more.

    `alpha` is this candidate's own level (see `budget`). `frozen_at_s` must be read from the clock that
    stamps `Sample.started_s`, the server's. `was_trained_on` says whether training has seen an answer.
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
        self.num_missing_context = 0
        self._config = config
        self._was_trained_on = was_trained_on
        self._wealth: deque[float] = deque([0.0], maxlen=config.stall_requests + 1)
        self._evidence = EProcess(float(num_draft_steps), config.min_gain_tokens)
        self._admitted: set[bytes] = set()
        self._observed: set[bytes] = set()
        self._sum_gain = 0.0
        self._sum_gain_squares = 0.0
        self._tokens = [0, 0]
        self._steps = [0, 0]

    @property
    def e_value(self) -> float:
        return self._evidence.e_value

    @property
    def is_stalled(self) -> bool:
        """At the pace of the last `stall_requests` the race would not be won within `max_requests`.

        The traffic moved on, or there is little gain. A reason to make room for a newer candidate, never one to
        promote: dropping is always allowed.
        """
        if len(self._wealth) < self._config.stall_requests + 1:
            return False
        pace = (self._wealth[-1] - self._wealth[0]) / self._config.stall_requests
        missing = -math.log(self.alpha) - self._wealth[-1]
        return pace * (self._config.max_requests - self.num_requests) < missing

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
        incumbent_tokens: int,
        incumbent_steps: int,
        candidate_tokens: int,
        candidate_steps: int,
        group: bytes,
        *,
        now_s: float,
        is_complete: bool = True,
    ) -> Verdict | None:
        """Take the two walks of one admitted request; return the verdict where this one decides.

        Tokens and steps are of the whole walk, bonus tokens counted. A walk without a step (an answer of one
        token) is counted and otherwise ignored. is_complete: False where both walks lacked the same prompt rows.
        """
        assert self.verdict is None, "the race is over"
        assert group in self._admitted, f"request {request} was not admitted"
        assert group not in self._observed, f"request {request} comes after another of its conversation"
        self._observed.add(group)
        if not incumbent_steps or not candidate_steps:
            self.num_dropped_empty += 1
            return None
        gain = candidate_tokens / candidate_steps - incumbent_tokens / incumbent_steps
        self._evidence.observe(gain)
        self._wealth.append(self._evidence.log_wealth)
        self.num_requests += 1
        self.num_missing_context += not is_complete
        self._sum_gain += gain
        self._sum_gain_squares += gain * gain
        self._tokens[0] += incumbent_tokens
        self._tokens[1] += candidate_tokens
        self._steps[0] += incumbent_steps
        self._steps[1] += candidate_steps
        self.verdict = self._decide(now_s)
        return self.verdict

    def withdraw(self, reason: str, *, now_s: float) -> Verdict:
        """End the race from outside: the incumbent changed, traffic dried up, the process stops."""
        assert self.verdict is None, "the race is over"
        self.verdict = self._verdict("drop", reason, now_s)
        return self.verdict

    def _decide(self, now_s: float) -> Verdict | None:
        """First rule that applies; None while the race goes on."""
        wanted = self._config.min_gain_tokens
        gain = f"{self.mean_gain_tokens:+.3f} tokens"
        said = f"a mean gain of {gain} over {self.num_requests} held-out requests"
        if self.num_requests >= self._config.min_requests and self._evidence.has_rejected(self.alpha):
            return self._verdict("promote", f"{said} shows more than {wanted:g}", now_s)
        if self.num_requests >= self._config.futility_requests and self.mean_gain_tokens <= wanted:
            return self._verdict("drop", f"{said} is not above {wanted:g}", now_s)
        if self.num_requests >= self._config.max_requests:
            return self._verdict("drop", f"{said} leaves open whether it exceeds {wanted:g}", now_s)
        return None

    def _interval(self) -> tuple[float, float]:
        """95 % normal approximation; the whole range of differences below two requests."""
        bound = self._evidence.bound_tokens
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
            mean_gain_tokens=self.mean_gain_tokens,
            interval_tokens=self._interval(),
            e_value=self.e_value,
            threshold=1.0 / self.alpha,
            alpha=self.alpha,
            accept_length_incumbent=self._tokens[0] / max(self._steps[0], 1),
            accept_length_candidate=self._tokens[1] / max(self._steps[1], 1),
            num_dropped_early=self.num_dropped_early,
            num_dropped_duplicates=self.num_dropped_duplicates,
            num_dropped_trained=self.num_dropped_trained,
            num_dropped_empty=self.num_dropped_empty,
            num_missing_context=self.num_missing_context,
            frozen_at_s=self.frozen_at_s,
            decided_at_s=now_s,
        )
