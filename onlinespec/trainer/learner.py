"""One draft's learning: samples in, steps out. What the sidecar does live and `onlinespec train` from a recording.

New requests pay for optimizer steps (`trainer.passes` per `trainer.batch_requests`), so that training keeps
pace with the stream instead of repeating what little there is. Times are passed in; nothing here reads a clock.
"""

from collections.abc import Mapping
from typing import Any

import torch

from onlinespec.config import Config
from onlinespec.draft.config import DraftConfig
from onlinespec.draft.sample import Sample
from onlinespec.trainer.buffer import Buffer
from onlinespec.trainer.step import StepResult, Trainer

_MAX_CREDIT_STEPS = 4.0


class Learner:
    """Buffer, trainer and pace. is_fresh: see `Trainer`. Shapes: embed_VD the target's embedding table."""

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

    @property
    def is_due(self) -> bool:
        """New requests have paid for a step."""
        return self._credit_steps >= 1

    def add(self, sample: Sample, now_s: float) -> None:
        """Remember a training request."""
        self.num_tokens += sample.num_answer_tokens
        self.buffer.add(sample, now_s)
        trainer = self._config.trainer
        if trainer.enabled:
            credit = self._credit_steps + trainer.passes / trainer.batch_requests
            self._credit_steps = min(credit, _MAX_CREDIT_STEPS)

    def step(self, now_s: float) -> StepResult | None:
        """One optimizer step; None where none is due."""
        if not self.is_due:
            return None
        self._credit_steps -= 1
        trainer = self._config.trainer
        return self.trainer.step(self.buffer.draw(trainer.batch_requests * trainer.accumulation, now_s))

    def state(self) -> dict[str, Any]:
        """A copy of all that the next steps depend on but the rows, which are never written for it."""
        return {
            "trainer": self.trainer.state(),
            "buffer": self.buffer.state(),
            "num_tokens": self.num_tokens,
            "credit_steps": self._credit_steps,
        }

    def load_state(self, state: dict[str, Any], samples: Mapping[int, Sample] | None = None) -> None:
        """Go on where the learner that gave this state stood.

        samples: what its buffer held, by request; with them the next losses are those of an unbroken run. None
        where the rows are gone: the buffer fills from the stream again.
        """
        self.trainer.load_state(state["trainer"])
        self.num_tokens = state["num_tokens"]
        self._credit_steps = state["credit_steps"]
        if samples is not None:
            self.buffer.load_state(state["buffer"], samples)
