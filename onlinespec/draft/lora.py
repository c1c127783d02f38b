"""LoRA: low-rank adapters on a draft's matrices, merged into plain weights when the draft is published.

W + alpha / r * B A with A [r, I] noise and B [O, r] zeros, so that an adapted draft starts as the draft it
adapts. The parametrization is torch's own: the model goes on reading `module.weight`.

O rows and I columns of a matrix, r rank.

Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; torch.nn.utils.parametrize.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from onlinespec.draft.model import Draft


class Adapter(nn.Module):
    """Adds its low-rank product to a matrix. Shapes: lora_a [r, I], lora_b [O, r]."""

    def __init__(self, shape: tuple[int, int], rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        num_rows, num_columns = shape
        self.lora_a = nn.Parameter(torch.randn(rank, num_columns, generator=generator) * num_columns**-0.5)
        self.lora_b = nn.Parameter(torch.zeros(num_rows, rank))
        self.scale = alpha / rank

    def forward(self, weight_OI: torch.Tensor) -> torch.Tensor:
        return torch.addmm(weight_OI, self.lora_b, self.lora_a, alpha=self.scale)


def add_adapters(draft: Draft, names: Sequence[str], rank: int, alpha: float, generator: torch.Generator) -> None:
    """Freeze the whole draft and put an adapter on each named weight."""
    draft.requires_grad_(False)
    for name in names:
        weight = draft.get_parameter(name)
        adapter = Adapter((weight.shape[0], weight.shape[1]), rank, alpha, generator).to(weight.device)
        parametrize.register_parametrization(draft.get_submodule(name.removesuffix(".weight")), "weight", adapter)


def adapter_name(name: str, factor: str) -> str:
    """Parameter name of an adapted weight's factor, "lora_a" or "lora_b"."""
    return f"{name.removesuffix('.weight')}.parametrizations.weight.0.{factor}"


def merged(
    weights: Mapping[str, torch.Tensor], factors: Mapping[str, torch.Tensor], names: Sequence[str], scale: float
) -> dict[str, torch.Tensor]:
    """The adapted weights as plain ones. factors: by `adapter_name`; scale is alpha / rank."""
    return {
        name: torch.addmm(
            weights[name], factors[adapter_name(name, "lora_b")], factors[adapter_name(name, "lora_a")], alpha=scale
        )
        for name in names
    }
