"""What of a draft is trained, and its moving average: adapters or the tensors themselves, less what is frozen.

A tensor that becomes frozen is set to its average first, so that from then on every candidate carries the
same one and draft KV in the server stays valid from candidate to candidate.
"""

from collections.abc import Mapping
from typing import Any

import torch

from onlinespec.config import TrainerConfig
from onlinespec.draft.config import DraftConfig
from onlinespec.draft.header import canonical_names
from onlinespec.draft.lora import add_adapters, merged
from onlinespec.draft.model import Draft
from onlinespec.draft.place import is_flex
from onlinespec.draft.trainable import adapted_names, check_trainable, frozen_names


class Parameters:
    """Raises: ConfigError where kv_mode or the adapters do not fit the draft."""

    def __init__(self, config: TrainerConfig, draft_config: DraftConfig, weights: dict[str, torch.Tensor]):
        self.draft = Draft(draft_config, weights).to(config.device)
        self._config = config
        base = self.draft.weights()
        shapes = canonical_names(draft_config)
        check_trainable(shapes, config.kv_mode, config.lora_rank, config.lora_targets)
        self._frozen = frozen_names(shapes, config.kv_mode)
        self._is_frozen = False
        self._adapted: list[str] = []
        self._scale = config.lora_alpha / config.lora_rank if config.lora_rank else 0.0
        if config.lora_rank:
            self._adapted = adapted_names(shapes, config.lora_targets, self._frozen)
            generator = torch.Generator().manual_seed(config.seed)
            add_adapters(self.draft, self._adapted, config.lora_rank, config.lora_alpha, generator)
        self.draft.is_recomputing = config.checkpoint_activations
        self.draft.is_flex = is_flex(config.attention, config.device)
        if config.compile:
            self.draft.compile_layers()
        self.trained = {name: p for name, p in self.draft.named_parameters() if p.requires_grad}
        """by the model's own names; a frozen one stays listed and has no gradient"""
        self._base = {name: tensor for name, tensor in base.items() if self._adapted or name not in self.trained}
        """what a checkpoint holds beside what is trained: what adapters adapt, or the vocabulary map alone"""
        self._averaged = {name: p.detach().clone() for name, p in self.trained.items()}

    def freeze(self) -> None:
        """Stop training what kv_mode freezes; once is enough."""
        if self._is_frozen:
            return
        self._is_frozen = True
        for name in self._frozen & self.trained.keys():
            parameter = self.trained[name]
            parameter.data.copy_(self._averaged[name])
            parameter.requires_grad_(False)

    @torch.no_grad()
    def average(self, num_steps: int) -> None:
        """After a step. Young averages forget faster, so that a fresh draft's noise does not linger."""
        decay = min(self._config.ema_decay, num_steps / (num_steps + 10))
        for name, parameter in self.trained.items():
            if parameter.requires_grad:
                self._averaged[name].lerp_(parameter, 1 - decay)

    def averaged_weights(self) -> dict[str, torch.Tensor]:
        """A checkpoint's tensors, adapters merged: CPU, float32, copies."""
        return _plain(self._base, _on_cpu(self._averaged), self._adapted, self._scale)

    def state(self) -> dict[str, Any]:
        """A copy of all that `load_state` wants."""
        return {
            "base": {name: tensor.clone() for name, tensor in self._base.items()},
            "adapted": list(self._adapted),
            "scale": self._scale,
            "current": _on_cpu(self.trained),
            "averaged": _on_cpu(self._averaged),
        }

    def base_of(self, state: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The weights that a state's adapters adapt, or its own where it has none."""
        return _plain(self._base | state["base"], {} if state["adapted"] else state["current"], [], 0.0)

    def weights_of(self, state: dict[str, Any]) -> dict[str, torch.Tensor]:
        """A state's current weights as plain ones, whatever was trained then."""
        return _plain(self._base | state["base"], state["current"], state["adapted"], state["scale"])

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what the same parameters were; they must stand on the state's own base."""
        for name, parameter in self.trained.items():
            self._averaged[name].copy_(state["averaged"][name])
            is_held = self._is_frozen and name in self._frozen
            parameter.copy_(state["averaged" if is_held else "current"][name])


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _plain(
    base: dict[str, torch.Tensor], trained: dict[str, torch.Tensor], adapted: list[str], scale: float
) -> dict[str, torch.Tensor]:
    moved = merged(base, trained, adapted, scale) if adapted else trained
    return {name: tensor.clone() for name, tensor in {**base, **moved}.items()}
