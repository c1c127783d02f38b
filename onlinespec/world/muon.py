"""Muon in float32, for the matrices of a model small enough to train on a CPU.

torch.optim.Muon orthogonalises in bfloat16, which a CPU without AMX emulates
slowly. Here matrices of one shape are orthogonalised together, in float32.
"""

from collections.abc import Iterable

import torch

from onlinespec.trainer.optim import orthogonalize


class Muon(torch.optim.Optimizer):
    """Momentum SGD with orthogonalised updates; every parameter must be a float32 matrix with a gradient."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                gradient = torch.stack([p.grad for p in parameters if p.grad is not None])
                state = self.state[parameters[0]]
                velocity = state.setdefault("velocity", torch.zeros_like(gradient))
                velocity.lerp_(gradient, 1 - group["momentum"])
                update = orthogonalize(gradient.lerp(velocity, group["momentum"]))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, change in zip(parameters, update, strict=True):
                    parameter.add_(change, alpha=-group["lr"] * scale)
