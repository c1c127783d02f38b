"""Feeds the guard and the lag: requests that the draft in service answered, beside its own walk and its parent's.

Shapes: R draft rows of an answer, K draft steps.
"""

import torch

from onlinespec.config import GuardConfig
from onlinespec.draft.model import Draft
from onlinespec.draft.sample import Sample, VerifySteps
from onlinespec.draft.walk import accept_walk
from onlinespec.gate.guard import Guard, GuardVerdict, WatchedRequest, watched_steps
from onlinespec.gate.lag import Lag
from onlinespec.gate.verdict import Walked


def walked(steps: VerifySteps, end: int, num_steps: int) -> Walked:
    """What an accept walk up to position `end`, the last committed token's, comes to.

    A draft position past the end was never checked and counts as not reached.
    """
    starts = list(zip(steps.start, steps.num_correct, strict=True))
    reached = [sum(correct >= k and start + k < end for start, correct in starts) for k in range(num_steps)]
    matched = [sum(correct > k for _, correct in starts) for k in range(num_steps)]
    return Walked(sum(steps.num_committed), len(steps), tuple(reached), tuple(matched))


class Watch:
    """The guard of one version. parent: its shadow. in_service_s: the server's wall clock when the version came."""

    def __init__(
        self,
        config: GuardConfig,
        version: int,
        parent_version: int,
        parent: Draft,
        num_draft_steps: int,
        in_service_s: float,
        lag: Lag,
    ):
        self.parent = parent
        self.guard = Guard(config, version, parent_version)
        self._num_draft_steps = num_draft_steps
        self._in_service_s = in_service_s
        self._lag = lag

    def observe(
        self, sample: Sample, matches_RK: torch.Tensor, parent_RK: torch.Tensor | None, now_s: float
    ) -> GuardVerdict | None:
        """Take one finished request; the verdict where it shows harm.

        Shapes: bool [R, K] of the version in service and of its parent (`draft.walk.matches_each`); parent_RK is None
        for a request that is not held out.
        """
        verify = sample.verify
        age, first = watched_steps(
            verify.version,
            verify.is_mixed,
            verify.num_drafted,
            version=self.guard.version,
            num_draft_steps=self._num_draft_steps,
            is_complete=sample.missing_prompt_frac < 1.0,
            # What the server had cached may be of any age; a prompt read before the swap is of an older draft's. A
            # sidecar that restarts does not know the rows of what is cached (often the chat template's first tokens,
            # in every request): without them the walk is a little off, and waiting for exact ones would watch nothing.
            has_stale_prefix=sample.started_s <= self._in_service_s
            or sample.num_completed_rows > 0
            or not sample.is_complete,
        )
        if age == "aged" and sample.started_s <= self._lag.renewed_s:
            age = "excluded"  # on KV that newer requests no longer share
        live = expected = shadow = None
        if age != "excluded":
            live = Walked(sum(verify.num_committed[first:]), len(verify) - first)
            expected = self._walked(matches_RK, sample, verify.start[first])
            if age == "aged" and expected.steps:
                self._lag.observe(live.accept_length - expected.accept_length)
        if parent_RK is not None:
            shadow = self._walked(matches_RK, sample, sample.num_prompt_tokens)
        parent = None if parent_RK is None else self._walked(parent_RK, sample, sample.num_prompt_tokens)
        return self.guard.observe(WatchedRequest(sample.group, age, shadow, parent, live, expected), now_s=now_s)

    def status(self) -> dict[str, dict[str, float]]:
        """What each detector has seen."""
        return {
            name: {"requests": detector.num_requests, "mean_tokens": detector.mean_tokens}
            for name, detector in self.guard.detectors.items()
        }

    def _walked(self, matches_RK: torch.Tensor, sample: Sample, start: int) -> Walked:
        """From the verify step at position `start` on."""
        rows_rK = matches_RK[start - sample.num_prompt_tokens :]
        end = sample.num_tokens - 1
        return walked(accept_walk(rows_rK, start, end, self._num_draft_steps), end, self._num_draft_steps)
