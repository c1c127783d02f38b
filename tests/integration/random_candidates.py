"""A sidecar whose candidates are random weights: what the gate must never promote. Run like onlinespec.sidecar."""

import torch

from onlinespec import sidecar
from onlinespec.trainer.step import Trainer

_generator = torch.Generator().manual_seed(7)


def random_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        name: torch.randn(tensor.shape, generator=_generator) * tensor.shape[-1] ** -0.5
        for name, tensor in trainer.draft.weights().items()
    }


if __name__ == "__main__":
    Trainer.weights = random_weights
    sidecar.main()
