"""One draft's learning: samples in, steps out. What the sidecar does live and `onlinespec train` from a recording.

New requests pay for optimizer steps, so that each is drawn `trainer.passes` times, and that training keeps
pace with the stream instead of repeating what little there is. The first of a task cluster pay more: after a shift
there is most to learn and least of it. Where `buffer.min_failure_cases` asks for it, what
they pay is spent in rounds, each begun by so many new failure cases. Times are passed in; nothing here reads a
clock.
"""

from collections.abc import Mapping
from typing import Any

import torch

from onlinespec.config import Config
from onlinespec.draft.config import DraftConfig
from onlinespec.draft.sample import Sample
from onlinespec.trainer.buffer import Buffer
from onlinespec.trainer.step import StepResult, Trainer

_MAX_CREDIT_STEPS = 32.0
"""what may be saved up: requests end in bursts, and a trainer that has paused should not chase what is long gone"""


class Learner:
    """Buffer, trainer and credit. is_fresh: see `Trainer`. Shapes: embed_VD the target's embedding table."""

    def __init__(
        self,
        config: Config,
        draft_config: DraftConfig,
        weights: dict[str, torch.Tensor],
        embed_VD: torch.Tensor,
        is_fresh: bool = True,
    ):
        self.trainer = Trainer(config.trainer, draft_config, weights, embed_VD, is_fresh)
        self.buffer = Buffer(config.buffer, self.trainer.generator)
        self.num_tokens = 0
        """answer tokens added"""
        self._config = config
        self._credit_steps = 0.0
        self._num_failures_spent = 0
        """failure cases of rounds before this one"""
        self._is_in_round = False

    @property
    def is_due(self) -> bool:
        """New requests have paid for a step, and a round has begun."""
        is_ready = self._config.trainer.enabled and len(self.buffer) > 0
        return is_ready and self._credit_steps >= 1 and (self._is_in_round or self._has_cases)

    @property
    def _has_cases(self) -> bool:
        return self.buffer.num_failures - self._num_failures_spent >= self._config.buffer.min_failure_cases

    def add(self, sample: Sample, now_s: float) -> int:
        """Remember a training request. Returns its task cluster."""
        self.num_tokens += sample.num_answer_tokens
        cluster = self.buffer.add(sample, now_s)
        trainer = self._config.trainer
        if trainer.enabled:
            per_request = self._passes(cluster) / (trainer.batch_requests * trainer.accumulation)
            most = max(_MAX_CREDIT_STEPS, per_request * max(1, self._config.buffer.min_failure_cases))
            self._credit_steps = min(self._credit_steps + per_request, most)
        return cluster

    def _passes(self, cluster: int) -> int:
        clusters, trainer = self.buffer.clusters, self._config.trainer
        is_new = clusters.num_requests[clusters.ids.index(cluster)] <= trainer.new_task_requests
        return max(trainer.passes, trainer.new_task_passes) if is_new else trainer.passes

    def step(self, now_s: float) -> StepResult | None:
        """One optimizer step; None where none is due."""
        if not self.is_due:
            return None
        if not self._is_in_round:
            self._is_in_round = True
            self._num_failures_spent = self.buffer.num_failures
        self._credit_steps -= 1
        if self._credit_steps < 1:
            self._is_in_round = False
        trainer = self._config.trainer
        return self.trainer.step(self.buffer.draw(trainer.batch_requests * trainer.accumulation, now_s))

    def state(self) -> dict[str, Any]:
        """A copy of all that the next steps depend on but the rows, which are never written for it."""
        return {
            "trainer": self.trainer.state(),
            "buffer": self.buffer.state(),
            "num_tokens": self.num_tokens,
            "credit_steps": self._credit_steps,
            "num_failures_spent": self._num_failures_spent,
            "is_in_round": self._is_in_round,
        }

    def load_state(self, state: dict[str, Any], samples: Mapping[int, Sample] | None = None) -> None:
        """Go on where the learner that gave this state stood.

        samples: by request number, all that the buffer held: the next steps are then those of an unbroken run.
        None where the rows are gone; the buffer fills from the stream again.
        """
        self.trainer.load_state(state["trainer"])
        self.buffer.load_state(state["buffer"], samples or {})
        self.num_tokens = state["num_tokens"]
        self._credit_steps = state["credit_steps"]
        self._num_failures_spent = state["num_failures_spent"]
        self._is_in_round = state["is_in_round"]
