"""Extend and decode attention over SGLang's paged KV cache, in plain torch.

Dispatch of small torch ops, not arithmetic, is what a step costs on this path, so requests are answered together:
those with the same number of query rows and similar lengths share one `scaled_dot_product_attention` call, their keys
padded to the longest and masked. What depends only on lengths and slots (the gather rows, the mask) is a `Plan`; the
layers of one forward pass share it. A plan is reused only while its whole input is unchanged: the lengths by value,
the slot table by identity and by torch's own version counter, which every in-place write bumps. A table without a
counter (made in inference mode) is never reused. One thread calls these kernels, so the memory is one plan.

Shape suffixes: B requests, T packed query rows, S cache slots, H query heads, J key/value heads, D head dim,
E head dim of the values, N query rows of each request in a group, L keys of its longest request.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from onlinespec.cpu.errors import UnsupportedOnCpuError, unsupported_argument_message

# A separate call costs about as much as gathering this many rows more (2.5 GHz Xeon, one thread, 2 x 64 float32 rows).
PADDING_ROWS_PER_CALL = 512
# Up to here the query heads that share a key head become extra query rows; beyond it the mask would be too large.
MAX_FOLDED_ROWS = 16


@dataclass(slots=True)
class Group:
    """Requests that one attention call answers; `query_T` None means every packed row, in order."""

    num_requests: int
    num_rows: int
    num_keys: int
    query_T: torch.Tensor | None
    slots: torch.Tensor
    mask: torch.Tensor | None
    is_causal: bool
    is_folded: bool


@dataclass(slots=True)
class Plan:
    """The groups of one forward pass and the input they were computed from."""

    table: torch.Tensor
    table_version: int
    key: tuple
    groups: list[Group]


@dataclass(slots=True)
class Batch:
    """What the host has to know of the requests of one call, one entry each; no tree means chains."""

    requests: list[int]
    lengths: list[int]
    rows: list[int]
    starts: list[int]
    tree_mask: torch.Tensor | None


class PlanMemory:
    """Keep the last plan."""

    def __init__(self) -> None:
        self._plan: Plan | None = None

    def find(self, table: torch.Tensor, key: tuple) -> list[Group] | None:
        plan = self._plan
        if plan is None or plan.table is not table or plan.table_version != table._version or plan.key != key:
            return None
        return plan.groups

    def keep(self, table: torch.Tensor, key: tuple, groups: list[Group]) -> None:
        self._plan = Plan(table, table._version, key, groups)


_plans = PlanMemory()


def _refuse_unsupported(
    kernel: str,
    buffer: torch.Tensor,
    scales: tuple[float, float],
    logit_cap: float,
    is_cross_attention: bool,
    sliding_window: int,
    encoder_lens: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    if (
        logit_cap == 0
        and not is_cross_attention
        and sliding_window <= 0
        and encoder_lens is None
        and sinks is None
        and scales == (1.0, 1.0)
        and buffer.dtype.itemsize >= 2
    ):
        return
    found = {
        "logit_cap": (logit_cap, logit_cap != 0),
        "is_cross_attention": (is_cross_attention, is_cross_attention),
        "sliding_window": (sliding_window, sliding_window > 0),
        "encoder_lens": (encoder_lens, encoder_lens is not None),
        "sinks": (sinks, sinks is not None),
        "(k_scale, v_scale)": (scales, scales != (1.0, 1.0)),
        "kv cache dtype": (buffer.dtype, buffer.dtype.itemsize < 2),
    }
    name, value = next((name, value) for name, (value, is_refused) in found.items() if is_refused)
    raise UnsupportedOnCpuError(unsupported_argument_message(kernel, name, value))


def _split_into_groups(lengths: list[int], rows: list[int]) -> list[list[int]]:
    """Split requests so that one more call would cost more than the padding it saves; order inside a group is kept."""
    order = sorted(range(len(lengths)), key=lambda i: (rows[i], -lengths[i]))
    groups: list[list[int]] = []
    for i in order:
        first = groups[-1][0] if groups else i
        padding = (lengths[first] - lengths[i]) * max(rows[i], 8)
        if groups and rows[first] == rows[i] and padding <= 8 * PADDING_ROWS_PER_CALL:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [sorted(group) for group in groups]


def _visible(lengths_B: torch.Tensor, num_rows: int, num_keys: int, tree_BNN: torch.Tensor | None) -> torch.Tensor:
    """Return what each query row may see, bool [B, N, L]: its prefix, and of the N new rows those before it or above
    it in its tree."""
    columns = torch.arange(num_keys)
    prefix_B = lengths_B - num_rows
    if tree_BNN is None:
        return columns <= (prefix_B[:, None] + torch.arange(num_rows))[:, :, None]
    offset_BL = columns - prefix_B[:, None]
    is_new_BL = (offset_BL >= 0) & (offset_BL < num_rows)
    index = offset_BL.clamp(0, num_rows - 1)[:, None, :].expand(-1, num_rows, -1)
    return torch.where(is_new_BL[:, None, :], tree_BNN.gather(2, index), (offset_BL < 0)[:, None, :])


def _additive_mask(visible_BNL: torch.Tensor, num_folds: int, dtype: torch.dtype) -> torch.Tensor:
    """Turn [B, N, L] visibility into an additive mask [B, 1, folds * N, L]."""
    mask = torch.zeros(visible_BNL.shape, dtype=dtype).masked_fill_(~visible_BNL, float("-inf"))
    if num_folds > 1:
        mask = mask.repeat(1, num_folds, 1)
    return mask[:, None]


def _group_slots(table: torch.Tensor, requests: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Return the cache slots of a group, int64 [B * L].

    Padding points at the request's own first slot, so that another request's NaN can never leak in through it.
    """
    longest = max(lengths)
    slots_BL = table[:, :longest].index_select(0, requests)
    if min(lengths) != longest:
        is_padding_BL = torch.arange(longest) >= torch.tensor(lengths)[:, None]
        slots_BL = torch.where(is_padding_BL, slots_BL[:, :1], slots_BL)
    return slots_BL.reshape(-1)


def _plan_groups(table: torch.Tensor, batch: Batch, num_folds: int, dtype: torch.dtype) -> list[Group]:
    planned = []
    everything = list(range(sum(batch.rows)))
    for members in _split_into_groups(batch.lengths, batch.rows):
        num_rows, lengths = batch.rows[members[0]], [batch.lengths[i] for i in members]
        longest, is_ragged = max(lengths), min(lengths) != max(lengths)
        is_folded = num_rows * num_folds <= MAX_FOLDED_ROWS
        tree_BNN = None if batch.tree_mask is None else batch.tree_mask.view(-1, num_rows, num_rows)[members]
        # One query row over unpadded keys sees them all; without a prefix torch's own causal mask is the cheapest.
        needs_none = num_rows == 1 and not is_ragged
        uses_torch_causal = tree_BNN is None and not is_ragged and longest == num_rows and not is_folded
        mask = None
        if not needs_none and not uses_torch_causal:
            visible = _visible(torch.tensor(lengths), num_rows, longest, tree_BNN)
            mask = _additive_mask(visible, num_folds if is_folded else 1, dtype)
        query = [batch.starts[i] + j for i in members for j in range(num_rows)]
        planned.append(
            Group(
                num_requests=len(members),
                num_rows=num_rows,
                num_keys=longest,
                query_T=None if query == everything else torch.tensor(query),
                slots=_group_slots(table, torch.tensor([batch.requests[i] for i in members]), lengths),
                mask=mask,
                is_causal=uses_torch_causal,
                is_folded=is_folded,
            )
        )
    return planned


def _attend(
    group: Group,
    query_THD: torch.Tensor,
    k_buffer_SJD: torch.Tensor,
    v_buffer_SJE: torch.Tensor,
    output_THE: torch.Tensor,
    scale: float,
) -> None:
    """Answer one group and write its rows of the output."""
    b, n, keys = group.num_requests, group.num_rows, group.num_keys
    query = query_THD if group.query_T is None else query_THD.index_select(0, group.query_T)
    heads, kv_heads, dim_v = query.shape[1], k_buffer_SJD.shape[1], v_buffer_SJE.shape[2]
    k = k_buffer_SJD.index_select(0, group.slots).view(b, keys, kv_heads, -1).transpose(1, 2)
    v = v_buffer_SJE.index_select(0, group.slots).view(b, keys, kv_heads, dim_v).transpose(1, 2)
    if k.dtype != query.dtype:
        k, v = k.to(query.dtype), v.to(query.dtype)
    if group.is_folded:
        folds = heads // kv_heads
        q = query.view(b, n, kv_heads, folds, -1).permute(0, 2, 3, 1, 4).reshape(b, kv_heads, folds * n, -1)
        out = scaled_dot_product_attention(q, k, v, attn_mask=group.mask, scale=scale)
        out = out.view(b, kv_heads, folds, n, dim_v).permute(0, 3, 1, 2, 4)
    else:
        q = query.view(b, n, heads, -1).transpose(1, 2)
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=group.mask, is_causal=group.is_causal, scale=scale, enable_gqa=heads != kv_heads
        ).transpose(1, 2)
    if group.query_T is None:
        output_THE.view(out.shape).copy_(out)
    else:
        output_THE.index_copy_(0, group.query_T, out.reshape(-1, heads, dim_v))


def _answer(
    batch: Batch,
    table: torch.Tensor,
    query_THD: torch.Tensor,
    k_buffer_SJD: torch.Tensor,
    v_buffer_SJE: torch.Tensor,
    output_THE: torch.Tensor,
    scale: float,
) -> None:
    """Answer every group of a batch, planning only what the last call did not plan already."""
    num_folds = query_THD.shape[1] // k_buffer_SJD.shape[1]
    if table.is_inference():
        groups = _plan_groups(table, batch, num_folds, query_THD.dtype)
    else:
        tree = None if batch.tree_mask is None else batch.tree_mask.numpy().tobytes()
        key = (batch.requests, batch.lengths, batch.rows, batch.starts, tree, num_folds, query_THD.dtype)
        found = _plans.find(table, key)
        groups = _plan_groups(table, batch, num_folds, query_THD.dtype) if found is None else found
        if found is None:
            _plans.keep(table, key, groups)
    for group in groups:
        _attend(group, query_THD, k_buffer_SJD, v_buffer_SJE, output_THE, scale)


def decode_attention_cpu(
    query: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    k_scale: float,
    v_scale: float,
    output: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    loc: torch.Tensor,
    attn_logits: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
    logit_cap: float,
    is_cross_attention: bool,
    sliding_window: int,
    encoder_lens: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    """Store the new row of K and V of each request, then attend from it over all its rows.

    Shapes: query [B, H, D]; k_buffer [S, J, D]; v_buffer [S, J, E]; output [B, H, E], written; key [B, J, D] and
    value [B, J, E], or None where they are already stored; loc int64 [B]; attn_logits unused; req_to_token int [R, C];
    req_pool_indices int [B]; seq_lens int64 [B], the new row counted.
    Raises: UnsupportedOnCpuError for sliding windows (> 0), logit caps, sinks, cross attention, encoder lengths,
    scales other than 1 and one-byte caches.
    Source: SGLang 0.5.23, srt/layers/attention/intel_amx_backend.py, IntelAMXAttnBackend.forward_decode.
    """
    scales = (k_scale, v_scale)
    _refuse_unsupported(
        "decode_attention_cpu", k_buffer, scales, logit_cap, is_cross_attention, sliding_window, encoder_lens, sinks
    )
    if query.shape[0] == 0:
        return
    if key is not None and value is not None:
        k_buffer.index_copy_(0, loc.long(), key.view(-1, *k_buffer.shape[1:]).to(k_buffer.dtype))
        v_buffer.index_copy_(0, loc.long(), value.view(-1, *v_buffer.shape[1:]).to(v_buffer.dtype))
    num = query.shape[0]
    batch = Batch(req_pool_indices.tolist(), seq_lens.tolist(), [1] * num, list(range(num)), None)
    _answer(batch, req_to_token, query, k_buffer, v_buffer, output, sm_scale)


def extend_attention_cpu(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    output: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    k_scale: float,
    v_scale: float,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    extend_start_loc: torch.Tensor,
    max_len_extend: int,
    sm_scale: float,
    logit_cap: float,
    is_cross_attention: bool,
    sliding_window: int,
    encoder_lens: torch.Tensor | None,
    sinks: torch.Tensor | None,
    tree_mask: torch.Tensor | None,
    is_causal: bool,
) -> None:
    """Attend from the new rows of each request over its cached prefix and over those new rows it may see.

    The new rows of K and V are read back from the cache, where `forward_extend` stores them just before; `key` and
    `value` are not read.

    Shapes: query [T, H, D]; key [T, J, D]; value [T, J, E]; output [T, H, E], written; k_buffer [S, J, D];
    v_buffer [S, J, E]; req_to_token int [R, C]; req_pool_indices int [B]; seq_lens int64 [B], new rows counted;
    extend_seq_lens and extend_start_loc int [B]; tree_mask bool [B * N * N], rows of each request's N x N tree, or None
    for a chain.
    Raises: UnsupportedOnCpuError as `decode_attention_cpu`, for attention that is not causal, and for a tree mask over
    requests of unequal row counts.
    Source: SGLang 0.5.23, srt/layers/attention/intel_amx_backend.py, IntelAMXAttnBackend.forward_extend.
    """
    scales = (k_scale, v_scale)
    _refuse_unsupported(
        "extend_attention_cpu", k_buffer, scales, logit_cap, is_cross_attention, sliding_window, encoder_lens, sinks
    )
    if not is_causal:
        raise UnsupportedOnCpuError(unsupported_argument_message("extend_attention_cpu", "is_causal", is_causal))
    if query.shape[0] == 0:
        return
    rows = extend_seq_lens.tolist()
    if tree_mask is not None and (
        len(set(rows)) != 1 or tree_mask.dtype != torch.bool or tree_mask.numel() != len(rows) * rows[0] ** 2
    ):
        raise UnsupportedOnCpuError(unsupported_argument_message("extend_attention_cpu", "tree_mask", tree_mask))
    batch = Batch(req_pool_indices.tolist(), seq_lens.tolist(), rows, extend_start_loc.tolist(), tree_mask)
    _answer(batch, req_to_token, query, k_buffer, v_buffer, output, sm_scale)
