"""One optimizer step on a draft, and the state that a restart resumes from.

Given the same batches a resumed trainer gives the same losses as an unbroken one. A step whose loss or
gradient is not finite is skipped and counted: the weights stay what they were. Parameters are float32
whatever the dtype of the forward pass: they are the masters, and an update too small for bfloat16 is kept.

M rows with a loss over all draft steps, K draft steps, V target vocabulary, D model dim.
"""

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from onlinespec.config import TrainerConfig
from onlinespec.draft.config import DraftConfig
from onlinespec.draft.losses import Terms, head_loss
from onlinespec.draft.model import Draft
from onlinespec.draft.place import is_half, placed
from onlinespec.draft.sample import Sample
from onlinespec.trainer.batch import Batch, build_batch
from onlinespec.trainer.objective import Objective
from onlinespec.trainer.optim import DraftOptimizer
from onlinespec.trainer.parameters import Parameters

_REACH_DECAY = 0.95


@dataclass(frozen=True)
class StepResult:
    """What a step did. loss: weighted mean in nats per row (accept: its share of one), nan without rows.
    num_rows: rows with a loss at the first draft step, about one per answer token. grad_norm: before clipping."""

    loss: float
    num_rows: int
    grad_norm: float
    is_applied: bool
    """False where there was nothing to learn, or the loss or gradient was not finite"""


class Trainer:
    """Trains one draft. `weights` as `read_draft` gives them.

    is_fresh: the weights are untrained, so `kv_free_steps` applies, and kv_mode auto freezes nothing.

    Shapes: embed_VD the target's embedding table, any float dtype, on the CPU; it is only read.

    Raises: ConfigError where kv_mode or the adapters do not fit the draft.
    """

    _parameters: Parameters
    _optimizer: DraftOptimizer

    def __init__(
        self,
        config: TrainerConfig,
        draft_config: DraftConfig,
        weights: dict[str, torch.Tensor],
        embed_VD: torch.Tensor,
        is_fresh: bool = True,
    ):
        self.generator = torch.Generator().manual_seed(config.seed)
        """for the buffer's draws; part of the state"""
        self.num_skipped = 0
        """steps whose loss or gradient was not finite"""
        self._config = config
        self._draft_config = draft_config
        self._embed_VD = embed_VD
        self._device = torch.device(config.device)
        self._is_half = is_half(config.dtype, config.device)
        self._frozen_from_step = self._free_steps(is_fresh)
        self._num_steps_before = 0
        self._objective = Objective(config)
        self._reach_K = config.loss_decay ** torch.arange(config.unroll_steps)
        """measured share of chains that reach each draft step; until then the decay"""
        self._begin(weights)

    def _free_steps(self, is_fresh: bool) -> float:
        if not is_fresh:
            return 0
        return math.inf if self._config.kv_mode == "auto" else self._config.kv_free_steps

    def wait(self) -> None:
        """Until the device has done the last step: its update is only launched when `step` returns."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _begin(self, weights: dict[str, torch.Tensor]) -> None:
        if "_parameters" in vars(self):
            del self._parameters, self._optimizer  # a GPU may have no place for two drafts and their optimizers
            if self._device.type == "cuda":
                gc.collect()  # a compiled layer is part of a cycle
        self._parameters = Parameters(self._config, self._draft_config, weights)
        self._optimizer = DraftOptimizer(self._parameters.trained, self._config, self._is_half)
        self._draft_ids_V = self.draft.draft_ids()  # batches are built on the CPU
        self._freeze_when_due()

    @property
    def draft(self) -> Draft:
        """The draft as the last step left it; another object after a restart or a load."""
        return self._parameters.draft

    @property
    def num_steps(self) -> int:
        """Optimizer steps applied, those before a `restart` included."""
        return self._num_steps_before + self._optimizer.num_steps

    def _freeze_when_due(self) -> None:
        if self.num_steps >= self._frozen_from_step:
            self._parameters.freeze()

    def step(self, samples: Sequence[Sample]) -> StepResult:
        """Learn from the samples once, in `accumulation` passes of about equal size that add up to one step.

        Draft step k weighs loss_decay ** k (or what was measured to be reached), each as the mean over its own
        rows in all passes together.
        """
        config = self._config
        mix = self._objective.at(self.num_steps)
        parts = [samples[i :: config.accumulation] for i in range(min(config.accumulation, len(samples)))]
        built = [
            build_batch(part, self._embed_VD, config.unroll_steps, self._draft_ids_V, mix.hard_frac) for part in parts
        ]
        batches = [batch for batch in built if batch is not None]
        num_rows_K = torch.zeros(config.unroll_steps, dtype=torch.int64)
        for batch in batches:
            num_rows_K += batch.num_rows_per_step()
        batches = [placed(batch, self._device) for batch in batches]
        if not int(num_rows_K.sum()):
            return StepResult(math.nan, 0, 0.0, is_applied=False)
        decay_K = config.loss_decay ** torch.arange(config.unroll_steps)
        share_K = self._reach_K if config.step_weights == "reach" else decay_K
        weight_K = share_K / share_K.sum() / num_rows_K.clamp_min(1)
        terms = Terms(mix.kl, mix.reverse_kl, mix.accept / sum(batch.rows.num_queries for batch in batches))
        self._optimizer.zero_grad()
        loss = sum(self._backward(batch, weight_K, terms) for batch in batches)
        grad_norm = self._optimizer.clip()
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if is_finite:
            self._optimizer.step()
            self._parameters.average(self._optimizer.num_steps)
            self._freeze_when_due()
        else:
            self.num_skipped += 1
        self._optimizer.zero_grad()
        return StepResult(loss, int(num_rows_K[0]), grad_norm, is_applied=is_finite)

    def _backward(self, batch: Batch, weight_K: torch.Tensor, terms: Terms) -> float:
        """Add one batch's gradients; its share of the loss."""
        config = self._config
        weight_M = weight_K.to(self._device)[batch.chains.step_M]  # before: it would wait for what is launched
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._is_half):
            states_MD = self.draft.states(batch.rows).flatten(0, 1)[batch.kept_M]
        states_MD = states_MD.to(torch.bfloat16) if self._is_half else states_MD
        needs_chains = bool(terms.accept) or config.step_weights == "reach"
        loss, is_match_M = head_loss(
            states_MD,
            self.draft.lm_head.weight,
            batch.targets,
            weight_M,
            terms,
            batch.chains if needs_chains else None,
        )
        loss.backward()
        if config.step_weights == "reach":
            self._measure_reach(batch, is_match_M)
        return float(loss.detach())

    def _measure_reach(self, batch: Batch, is_match_M: torch.Tensor) -> None:
        """Shapes: bool [M], row after row of one query."""
        chains = batch.chains
        is_row_NK = torch.zeros(batch.rows.num_queries, chains.num_steps, device=self._device)
        is_row_NK[chains.chain_M, chains.step_M] = 1.0
        is_match_NK = torch.zeros_like(is_row_NK)
        is_match_NK[chains.chain_M, chains.step_M] = is_match_M.float()
        is_reached_NK = is_match_NK.cumprod(1).roll(1, 1)
        is_reached_NK[:, 0] = 1.0
        num_rows_K = is_row_NK.sum(0)
        reach_K = ((is_reached_NK * is_row_NK).sum(0) / num_rows_K.clamp_min(1)).cpu()
        measured_K = self._reach_K.lerp(reach_K, 1 - _REACH_DECAY)
        self._reach_K = torch.where(num_rows_K.cpu() > 0, measured_K, self._reach_K)

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the averaged draft, ready for `write_draft`: CPU, float32, the vocabulary map included."""
        return self._parameters.averaged_weights()

    def restart(self, weights: dict[str, torch.Tensor], is_fresh: bool = False) -> None:
        """Go on from other weights: an operator took the trainer's own back. The optimizer warms up again."""
        self._num_steps_before, self._optimizer.num_steps = self.num_steps, 0
        self._frozen_from_step = self.num_steps + self._free_steps(is_fresh)
        self._begin(weights)

    def state(self) -> dict[str, Any]:
        """A copy of all that the next steps depend on; `torch.load(weights_only=True)` reads it back."""
        return {
            "layout": self._layout(),
            "parameters": self._parameters.state(),
            "optimizer": self._optimizer.state_dict(),
            "objective": self._objective.state(),
            "reach": self._reach_K.clone(),
            "frozen_from_step": self._frozen_from_step,
            "num_skipped": self.num_skipped,
            "num_steps_before": self._num_steps_before,
            "generator": self.generator.get_state(),
        }

    def _layout(self) -> list[str]:
        """What must agree for an optimizer's state to fit: which parameters there are and who steps them."""
        config = self._config
        adapters = f"lora {config.lora_rank} {config.lora_alpha}" if config.lora_rank else "no lora"
        return [config.optimizer, str(config.unroll_steps), adapters, *self._parameters.trained]

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where the trainer that gave this state stood; the draft must be of the same shape.

        Where the config now trains other parameters or with another optimizer, only the weights are taken
        over, and the optimizer warms up again.
        """
        self.num_skipped = state["num_skipped"]
        self._num_steps_before = state["num_steps_before"]
        self._frozen_from_step = state["frozen_from_step"]
        if self._config.kv_mode != "auto" and math.isinf(self._frozen_from_step):
            self._frozen_from_step = self._config.kv_free_steps  # it was auto, and froze nothing
        self.generator.set_state(state["generator"])
        if state["layout"] != self._layout():
            self._num_steps_before += state["optimizer"]["num_steps"]
            self._begin(self._parameters.weights_of(state["parameters"]))
        else:
            self._begin(self._parameters.base_of(state["parameters"]))
            self._optimizer.load_state_dict(state["optimizer"])
            self._freeze_when_due()
            self._parameters.load_state(state["parameters"])
            self._reach_K = state["reach"].clone()
        self._objective.load_state(state["objective"], self.num_steps)
