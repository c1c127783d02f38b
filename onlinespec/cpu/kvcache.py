"""Which cache slot holds which token: the slot table of SGLang, and moves inside the cache, in plain torch.

`req_to_token` is the slot table, int32 [R, C]: row = request slot, column = position. Spans are short (a few slots a
request and step), so their flat indices are built as Python lists and used in one indexed read or write.
"""

import ctypes

import numpy
import torch


def _span_index(rows: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, num_columns: int) -> list[int]:
    """Flat indices of the spans [start, end) of the given table rows, request after request."""
    return [
        row * num_columns + column
        for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True)
        for column in range(start, end)
    ]


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write newly allocated slots into columns [start, end) of each request's row.

    Shapes: req_pool_indices, start_offset, end_offset int [B]; req_to_token int32 [R, C], written;
    out_cache_loc int64 [sum of spans].
    Source: SGLang 0.5.23, srt/mem_cache/allocation.py, assign_req_to_token_pool_func.
    """
    index = _span_index(req_pool_indices, start_offset, end_offset, req_to_token.shape[1])
    if index:
        values = out_cache_loc[: len(index)].to(req_to_token.dtype)
        req_to_token.view(-1).index_copy_(0, torch.tensor(index), values)


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Read the slots of columns [start, end) of each request's row, packed.

    Shapes: req_pool_indices, start_offset, end_offset int [B]; req_to_token int32 [R, C];
    out_cache_loc int [at least the sum of spans], its head written.
    Source: SGLang 0.5.23, kernels/ops/speculative/cache_locs.py, assign_extend_cache_locs_func and
    fill_front_out_cache_loc_func.
    """
    index = _span_index(req_pool_indices, start_offset, end_offset, req_to_token.shape[1])
    if index:
        out_cache_loc[: len(index)] = req_to_token.view(-1)[torch.tensor(index)]


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
    topk: int,
    num_steps: int,
) -> None:
    """Read the slots reserved for drafting, the `topk * num_steps` columns that follow each request's tokens.

    Shapes: req_pool_indices, seq_lens int [B]; req_to_token int32 [R, C];
    out_cache_loc int64 [B * topk * num_steps], written.
    Source: SGLang 0.5.23, kernels/ops/speculative/cache_locs.py, assign_draft_cache_locs_contiguous_func.
    """
    ends = seq_lens + topk * num_steps
    assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, seq_lens, ends, out_cache_loc, pool_len)


def build_draft_decode_metadata_cpu(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    topk: int,
    num_steps: int,
    pool_len: int,
) -> torch.Tensor:
    """Build the slot table of the draft's branches: row b * topk + k is request b's prefix, then branch k's own slots.

    Shapes: req_to_token int32 [R, C]; req_pool_indices, seq_lens int [B]; returns int32 [B * topk, max length +
    num_steps]; what lies beyond a row's length + num_steps is undefined.
    Source: SGLang 0.5.23, srt/layers/attention/intel_amx_backend.py, IntelAMXMultiStepDraftBackend.
    """
    width = max(seq_lens.tolist(), default=0) + num_steps
    if topk == 1:
        return req_to_token[:, :width].index_select(0, req_pool_indices)
    columns = torch.arange(width)
    branch_offsets = torch.arange(topk)[:, None] * num_steps
    is_drafted = columns >= seq_lens.long()[:, None, None]
    source = torch.where(is_drafted, columns + branch_offsets, columns).clamp_(max=req_to_token.shape[1] - 1)
    rows = req_to_token.index_select(0, req_pool_indices)[:, None, :].expand(-1, topk, -1)
    return rows.gather(2, source).view(-1, width)


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Copy cache rows from `src_loc` to `tgt_loc` in every buffer; all rows are read before any is written.

    Shapes: data_ptrs uint64 [2 * layers], addresses of contiguous buffers; strides int64 [2 * layers], bytes of a row;
    tgt_loc, src_loc int [num rows].
    Source: SGLang 0.5.23, kernels/ops/kvcache/cache_move.py, copy_all_layer_kv_cache_func.
    """
    if tgt_loc.numel() == 0:
        return
    target, source = tgt_loc.numpy(), src_loc.numpy()
    num_rows = int(max(target.max(), source.max())) + 1
    for address, row_bytes in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (num_rows * row_bytes)).from_address(address)
        rows = numpy.frombuffer(memory, dtype=numpy.uint8).reshape(num_rows, row_bytes)
        rows[target] = rows[source]
