"""The teacher: top-k logits and logsumexp of the target, in one pass over the vocabulary.

M rows, V vocabulary, k teacher top-k, C chunks of the vocabulary.

torch.topk and torch.logsumexp read 0.5 MB a row several times over. The kernel reads it once: each program takes
one chunk of one row into registers and leaves its k largest and its own logsumexp; what is left to torch is
[M, C * k]. A chunk has at least k tokens, so that no made-up id can be among the k of the row.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

_CHUNK = 4096


@dataclass(frozen=True)
class Teacher:
    """Target logits of M rows: ids and logits [M, k], lse [M], at temperature 1."""

    ids_Mk: torch.Tensor
    logits_Mk: torch.Tensor
    lse_M: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.ids_Mk, self.logits_Mk, self.lse_M


def teacher_of(logits_MV: torch.Tensor, k: int) -> Teacher:
    """Top-k logits and logsumexp in float32. Shapes: logits_MV [M, V], left as it is.

    Of equal logits either may come; ids of a row differ, those of logits -inf too.
    """
    fits = logits_MV.stride(1) == 1 and logits_MV.shape[1] >= 2 * _CHUNK and k <= _CHUNK // 2
    return fused(logits_MV, k) if logits_MV.is_cuda and fits else plain(logits_MV, k)


def plain(logits_MV: torch.Tensor, k: int) -> Teacher:
    """In plain torch; see `teacher_of`."""
    logits = logits_MV.float()
    values, ids = torch.topk(logits, min(k, logits.shape[1]), dim=1)
    return Teacher(ids.to(torch.int32), values, torch.logsumexp(logits, dim=1))


def fused(logits_MV: torch.Tensor, k: int) -> Teacher:
    """By the kernel; see `teacher_of`. Wants rows that are contiguous and chunks of at least k tokens."""
    num_rows, num_tokens = logits_MV.shape
    num_chunks = triton.cdiv(num_tokens, _CHUNK)
    span = triton.cdiv(num_tokens, num_chunks)
    assert num_tokens - span * (num_chunks - 1) >= k, (num_tokens, k)
    values = torch.empty(num_rows, num_chunks, k, dtype=torch.float32, device=logits_MV.device)
    ids = torch.empty(values.shape, dtype=torch.int32, device=logits_MV.device)
    lse_MC = torch.empty(num_rows, num_chunks, dtype=torch.float32, device=logits_MV.device)
    _top_k_of_chunks[(num_rows, num_chunks)](
        logits_MV, values, ids, lse_MC, logits_MV.stride(0), num_tokens, span, K=k, CHUNK=_CHUNK
    )
    logits_Mk, places = values.flatten(1).topk(k, dim=1)
    return Teacher(ids.flatten(1).gather(1, places), logits_Mk, torch.logsumexp(lse_MC, dim=1))


@triton.jit
def _top_k_of_chunks(
    logits_ptr: Any,
    values_ptr: Any,
    ids_ptr: Any,
    lse_ptr: Any,
    row_stride: Any,
    num_tokens: Any,
    span: Any,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of `span` <= CHUNK tokens of one row."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, CHUNK)
    token = chunk * span + lane
    is_open = (lane < span) & (token < num_tokens)
    logits = tl.load(logits_ptr + row * row_stride + token, mask=is_open, other=float("-inf")).to(tl.float32)
    place = row * tl.num_programs(1) + chunk
    largest = tl.max(logits, axis=0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    tl.store(lse_ptr + place, tl.log(tl.sum(tl.exp(logits - shift), axis=0)) + shift)
    for i in range(K):
        value = tl.max(tl.where(is_open, logits, float("-inf")), axis=0)
        first = tl.min(tl.where(is_open & (logits == value), token, num_tokens), axis=0)
        tl.store(values_ptr + place * K + i, value)
        tl.store(ids_ptr + place * K + i, first)
        is_open = is_open & (token != first)
