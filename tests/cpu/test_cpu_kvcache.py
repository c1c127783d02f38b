"""Slot-table kernels against loops. Exact."""

import pytest
import torch

from onlinespec.cpu.kvcache import (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    build_draft_decode_metadata_cpu,
    copy_all_layer_kv_cache_cpu,
)

ROWS, COLUMNS = 6, 40
REQUESTS = torch.tensor([4, 0, 5])


def slot_table():
    return torch.randperm(ROWS * COLUMNS, generator=torch.Generator().manual_seed(1)).view(ROWS, COLUMNS).int()


@pytest.mark.parametrize("ends", [[9, 2, 40], [6, 2, 38], [5, 2, 37]])
def test_new_slots_land_in_the_span_of_their_request_and_nowhere_else(ends):
    starts = [5, 2, 37]
    table = slot_table()
    expected, offset = table.clone(), 0
    slots = torch.arange(1000, 1000 + 20)
    for request, start, end in zip(REQUESTS.tolist(), starts, ends, strict=True):
        for column in range(start, end):
            expected[request, column] = slots[offset]
            offset += 1

    assign_req_to_token_pool_cpu(REQUESTS, table, torch.tensor(starts), torch.tensor(ends), slots, COLUMNS)

    assert torch.equal(table, expected)


@pytest.mark.parametrize("ends", [[9, 3, 40], [6, 2, 38]])
def test_extend_slots_are_read_packed_in_request_order(ends):
    starts, table = [5, 2, 37], slot_table()
    expected = [
        int(table[request, column])
        for request, start, end in zip(REQUESTS.tolist(), starts, ends, strict=True)
        for column in range(start, end)
    ]
    out = torch.full((12,), -7)

    assign_extend_cache_locs_cpu(REQUESTS, table, torch.tensor(starts), torch.tensor(ends), out, COLUMNS)

    assert out.tolist() == expected + [-7] * (12 - len(expected))


@pytest.mark.parametrize(("topk", "num_steps"), [(1, 3), (4, 3)])
def test_draft_slots_are_the_columns_after_the_tokens(topk, num_steps):
    lengths, table = torch.tensor([5, 0, 28]), slot_table()
    out = torch.empty(3 * topk * num_steps, dtype=torch.int64)

    assign_draft_cache_locs_contiguous_cpu(REQUESTS, table, lengths, out, COLUMNS, topk, num_steps)

    for b in range(3):
        for j in range(topk * num_steps):
            assert out[b * topk * num_steps + j] == table[REQUESTS[b], lengths[b] + j]


@pytest.mark.parametrize(("topk", "num_steps"), [(1, 4), (3, 4), (4, 2)])
def test_each_draft_branch_sees_the_prefix_and_its_own_slots(topk, num_steps):
    lengths, table = torch.tensor([5, 1, 26]), slot_table()

    branches = build_draft_decode_metadata_cpu(table, REQUESTS, lengths, topk, num_steps, COLUMNS)

    assert branches.dtype == torch.int32
    for b, length in enumerate(lengths.tolist()):
        for k in range(topk):
            row = table[REQUESTS[b]].tolist()
            own = row[length + k * num_steps : length + (k + 1) * num_steps]
            assert branches[b * topk + k, : length + num_steps].tolist() == row[:length] + own


def test_cache_rows_are_all_read_before_any_is_written():
    generator = torch.Generator().manual_seed(2)
    buffers = [torch.randn(20, width, generator=generator) for width in (8, 8, 3)]
    target, source = torch.tensor([3, 4, 5, 19]), torch.tensor([4, 3, 7, 5])
    expected = [buffer.clone() for buffer in buffers]
    for before, after in zip(buffers, expected, strict=True):
        for t, s in zip(target.tolist(), source.tolist(), strict=True):
            after[t] = before[s]

    copy_all_layer_kv_cache_cpu(
        torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.uint64),
        torch.tensor([buffer[0].nbytes for buffer in buffers]),
        target,
        source,
    )

    assert all(torch.equal(a, b) for a, b in zip(buffers, expected, strict=True))


def test_moving_no_rows_touches_no_memory():
    nothing = torch.empty(0, dtype=torch.int64)

    copy_all_layer_kv_cache_cpu(torch.tensor([8], dtype=torch.uint64), torch.tensor([16]), nothing, nothing)
