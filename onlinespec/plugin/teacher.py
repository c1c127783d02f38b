"""The teacher: top-k logits and logsumexp of the target, in one pass over the vocabulary.

B requests, M rows, V vocabulary, k teacher top-k, C chunks of the vocabulary.

torch.topk and torch.logsumexp read 0.5 MB a row several times over. The kernel reads it once: each program takes
one chunk of one row into registers and leaves its k largest and its own logsumexp; what is left to torch is
[M, C * k]. A chunk has at least k tokens, so that no made-up id can be among the k of the row. Which rows of a verify
step were rejected the device knows before the host does: their programs end at once, and nobody reads what they left.
"""

from dataclasses import dataclass

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


def teacher_of(logits_MV: torch.Tensor, k: int, accept_lens_B: torch.Tensor | None = None) -> Teacher:
    """Top-k logits and logsumexp in float32. accept_lens: see `fused`.

    Shapes: logits_MV [M, V], left as it is; accept_lens_B [B], on the device of the logits.
    Of equal logits either may come; ids of a row differ, those of logits -inf too.
    """
    fits = logits_MV.stride(1) == 1 and logits_MV.shape[1] >= 2 * _CHUNK and k <= _CHUNK // 2
    return fused(logits_MV, k, accept_lens_B) if logits_MV.is_cuda and fits else plain(logits_MV, k)


def plain(logits_MV: torch.Tensor, k: int) -> Teacher:
    """In plain torch; see `teacher_of`."""
    logits = logits_MV.float()
    values, ids = torch.topk(logits, min(k, logits.shape[1]), dim=1)
    return Teacher(ids.to(torch.int32), values, torch.logsumexp(logits, dim=1))


def fused(logits_MV: torch.Tensor, k: int, accept_lens_B: torch.Tensor | None = None) -> Teacher:
    """By the kernel; see `teacher_of`. Wants rows that are contiguous and chunks of at least k tokens.

    accept_lens: each request has M / B rows in turn, and only its first so many get a teacher; the others' is not
    defined. None: all rows get one.
    """
    num_rows, num_tokens = logits_MV.shape
    width = 1 if accept_lens_B is None else num_rows // len(accept_lens_B)
    assert accept_lens_B is None or num_rows == width * len(accept_lens_B), (num_rows, len(accept_lens_B))
    num_chunks = triton.cdiv(num_tokens, _CHUNK)
    span = triton.cdiv(num_tokens, num_chunks)
    assert num_tokens - span * (num_chunks - 1) >= k, (num_tokens, k)
    values = torch.empty(num_rows, num_chunks, k, dtype=torch.float32, device=logits_MV.device)
    ids = torch.empty(values.shape, dtype=torch.int32, device=logits_MV.device)
    lse_MC = torch.empty(num_rows, num_chunks, dtype=torch.float32, device=logits_MV.device)
    _top_k_of_chunks[(num_rows, num_chunks)](
        logits_MV,
        values,
        ids,
        lse_MC,
        accept_lens_B,
        logits_MV.stride(0),
        num_tokens,
        span,
        width,
        HAS_LENS=accept_lens_B is not None,
        K=k,
        CHUNK=_CHUNK,
    )
    logits_Mk, places = values.flatten(1).topk(k, dim=1)
    return Teacher(ids.flatten(1).gather(1, places), logits_Mk, torch.logsumexp(lse_MC, dim=1))


@triton.jit(do_not_specialize=["width"])
def _top_k_of_chunks(  # unannotated: triton's compiler takes a name in an annotation for a global of the kernel
    logits_ptr,
    values_ptr,
    ids_ptr,
    lse_ptr,
    accept_lens_ptr,
    row_stride,
    num_tokens,
    span,
    width,
    HAS_LENS: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of `span` <= CHUNK tokens of one row."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_kept = tl.load(accept_lens_ptr + row // width) if HAS_LENS else width
    if row % width >= num_kept:
        return
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
