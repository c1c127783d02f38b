"""Rows in one byte a value: half the bytes of bfloat16 over PCIe, the socket and the trainer's memory bus.

N rows, A captured layers, D target width.

e4m3 with one scale a row. The scale is a power of two, so that value times scale is exact in bfloat16 and no second
rounding comes on top. The relative error is at most 1/16 down to 2 ** -14 of the row's largest value and grows below;
what is smaller than 2 ** -18 of it becomes 0. Format: Micikevicius et al. 2022, "FP8 Formats for Deep Learning".
"""

import torch

_LARGEST_EXPONENT = 8
"""e4m3 ends at 448; a row's largest value is brought into [128, 256)"""


def pack_rows(aux_NA: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes: aux_NA [N, A*D] to float8_e4m3fn [N, A*D] and float32 scales [N]. A row that is not finite stays so."""
    largest_N = torch.linalg.vector_norm(aux_NA, torch.inf, dim=1).float()
    exponent_N = torch.frexp(largest_N).exponent
    scale_N = torch.ldexp(torch.ones_like(largest_N), exponent_N - _LARGEST_EXPONENT)
    scale_N = torch.where(largest_N.isfinite(), scale_N, largest_N)
    if aux_NA.dtype == torch.float16:  # it cannot hold every scale; the others divide by a power of two exactly
        aux_NA = aux_NA.float()
    return (aux_NA / scale_N.to(aux_NA.dtype)[:, None]).to(torch.float8_e4m3fn), scale_N
