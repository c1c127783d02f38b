"""One optimizer step on a draft, and the state that a restart resumes from.

Given the same batches a resumed trainer gives the same losses as an unbroken one. A step whose loss or
gradient is not finite is skipped and counted: the weights stay what they were.

M rows with a loss over all draft steps, K draft steps, V target vocabulary, D model dim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from onlinespec.config import TrainerConfig
from onlinespec.draft.config import DraftConfig
from onlinespec.draft.losses import head_loss
from onlinespec.draft.model import Draft
from onlinespec.draft.sample import Sample
from onlinespec.trainer.batch import build_batch
from onlinespec.trainer.optim import DraftOptimizer


@dataclass(frozen=True)
class StepResult:
    """What a step did. loss: weighted mean KL in nats per row, nan without rows. num_rows: rows with a loss
    at the first draft step, about one per answer token. grad_norm: before clipping."""

    loss: float
    num_rows: int
    grad_norm: float
    is_applied: bool
    """False where there was nothing to learn, or the loss or gradient was not finite"""


class Trainer:
    """Trains one draft. `weights` as `read_draft` gives them.

    Shapes: embed_VD the target's embedding table, any float dtype; it is only read.
    """

    def __init__(
        self,
        config: TrainerConfig,
        draft_config: DraftConfig,
        weights: dict[str, torch.Tensor],
        embed_VD: torch.Tensor,
    ):
        self.draft = Draft(draft_config, weights)
        self.generator = torch.Generator().manual_seed(config.seed)
        """for the buffer's draws; part of the state"""
        self.num_skipped = 0
        """steps whose loss or gradient was not finite"""
        self._config = config
        self._embed_VD = embed_VD
        self._draft_ids_V = self.draft.draft_ids()
        self._optimizer = DraftOptimizer(dict(self.draft.named_parameters()), config)
        self._num_steps_before = 0
        self._averaged = self.draft.weights()

    @property
    def num_steps(self) -> int:
        """Optimizer steps applied, those before a `restart` included."""
        return self._num_steps_before + self._optimizer.num_steps

    def step(self, samples: Sequence[Sample]) -> StepResult:
        """Learn from the samples once, in `accumulation` passes of about equal size that add up to one step.

        Draft step k weighs loss_decay ** k, each as the mean over its own rows in all passes together.
        """
        config = self._config
        parts = [samples[i :: config.accumulation] for i in range(min(config.accumulation, len(samples)))]
        built = [build_batch(part, self._embed_VD, config.unroll_steps, self._draft_ids_V) for part in parts]
        batches = [batch for batch in built if batch is not None]
        num_rows_K = torch.zeros(config.unroll_steps, dtype=torch.int64)
        for batch in batches:
            num_rows_K += batch.num_rows_per_step(config.unroll_steps)
        if not int(num_rows_K.sum()):
            return StepResult(math.nan, 0, 0.0, is_applied=False)
        decay_K = config.loss_decay ** torch.arange(config.unroll_steps)
        weight_K = decay_K / decay_K.sum() / num_rows_K.clamp_min(1)
        self._optimizer.zero_grad()
        loss = 0.0
        for batch in batches:
            states_MD = self.draft.states(batch.rows).flatten(0, 1)[batch.kept_M]
            part = head_loss(states_MD, self.draft.lm_head.weight, batch.targets, weight_K[batch.step_M])
            part.backward()
            loss += float(part.detach())
        grad_norm = self._optimizer.clip()
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if is_finite:
            self._optimizer.step()
            self._average()
        else:
            self.num_skipped += 1
        self._optimizer.zero_grad()
        return StepResult(loss, int(num_rows_K[0]), grad_norm, is_applied=is_finite)

    @torch.no_grad()
    def _average(self) -> None:
        """Young averages forget faster, so that a fresh draft's noise does not linger."""
        num_steps = self._optimizer.num_steps
        decay = min(self._config.ema_decay, num_steps / (num_steps + 10))
        for name, parameter in self.draft.named_parameters():
            self._averaged[name].lerp_(parameter.cpu(), 1 - decay)

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the averaged draft, ready for `write_draft`: CPU, float32, the vocabulary map included."""
        return {name: tensor.clone() for name, tensor in self._averaged.items()}

    def restart(self, weights: dict[str, torch.Tensor]) -> None:
        """Go on from other weights: an operator took the trainer's own back. The optimizer warms up again."""
        self._num_steps_before = self.num_steps
        self.draft.load_weights(weights)
        self._averaged = self.draft.weights()
        self._optimizer = DraftOptimizer(dict(self.draft.named_parameters()), self._config)

    def state(self) -> dict[str, Any]:
        """A copy of all that the next steps depend on; `torch.load(weights_only=True)` reads it back."""
        return {
            "weights": self.draft.weights(),
            "averaged": self.weights(),
            "optimizer": self._optimizer.state_dict(),
            "num_skipped": self.num_skipped,
            "num_steps_before": self._num_steps_before,
            "generator": self.generator.get_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where the trainer that gave this state stood; draft and config must be of the same shape."""
        self.draft.load_weights(state["weights"])
        self._averaged = {name: tensor.clone() for name, tensor in state["averaged"].items()}
        self._optimizer.load_state_dict(state["optimizer"])
        self.num_skipped = state["num_skipped"]
        self._num_steps_before = state["num_steps_before"]
        self.generator.set_state(state["generator"])
