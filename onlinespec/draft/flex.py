"""Attention of query rows to their own sample's context, without masks or probabilities in memory: FlexAttention.

What a query row's own later draft steps add is merged by the logsumexp of both parts. Wants CUDA for gradients; it is
compiled there, once for all numbers of rows.

C context rows, N query rows, H query heads, J key heads, d head dim, k own draft steps.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from onlinespec.draft.compiled import compiled
from onlinespec.draft.rows import Rows

# With fewer than 128 query rows Inductor turns to its decoding kernel, whose tiles fit no number of rows between
# 128 / (H / J) and 127: "no valid choices", and the process ends. Source: torch 2.13 _inductor/kernel/flex/
# flex_decoding.py; a short answer alone is such a batch.
_OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}


@functools.cache
def _compiled() -> Callable[..., Any]:
    return compiled(flex_attention)


class ContextAttention:
    """Of one batch's rows; every layer and draft step shares its mask of blocks."""

    def __init__(self, rows: Rows):
        query_N = rows.query_N
        contexts, queries = zip(*rows.sizes, strict=True)
        firsts = [sum(contexts[:i]) for i in range(len(contexts))]
        first_N = torch.cat([query_N.new_full((n,), first) for n, first in zip(queries, firsts, strict=True)])

        def is_seen(_batch, _head, query, context):  # type: ignore[no-untyped-def]
            return (context >= first_N[query]) & (context <= query_N[query])

        num_context = len(rows.position_C)
        self._mask: BlockMask = create_block_mask(is_seen, None, None, len(query_N), num_context, device=query_N.device)

    def __call__(
        self, query_NHd: torch.Tensor, key_CJd: torch.Tensor, value_CJd: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shapes: [N, H, d] out, and [N, H], logsumexp of the scores."""
        attend: Any = _compiled() if query_NHd.is_cuda else flex_attention
        kind = query_NHd.device.type
        # RoPE has widened them, and the kernel of float32 is several times slower.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query_NHd.dtype
        heads = (x.transpose(0, 1)[None].to(dtype) for x in (query_NHd, key_CJd, value_CJd))
        out, aux = attend(
            *heads, block_mask=self._mask, enable_gqa=True, return_aux=AuxRequest(lse=True), kernel_options=_OPTIONS
        )
        return out[0].transpose(0, 1), aux.lse[0].T


def merge(
    out_NHd: torch.Tensor, lse_NH: torch.Tensor, scores_NHk: torch.Tensor, values_NHkd: torch.Tensor
) -> torch.Tensor:
    """Attention over the context and the own steps together, from that over the context alone. Shapes: [N, H, d]."""
    own_NH = scores_NHk.logsumexp(-1)
    context_share = torch.sigmoid(lse_NH - own_NH)[..., None]
    own_NHd = torch.einsum("nhk,nhkd->nhd", scores_NHk.softmax(-1).to(values_NHkd.dtype), values_NHkd)
    return (context_share * out_NHd + (1 - context_share) * own_NHd).to(out_NHd.dtype)
