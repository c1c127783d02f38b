"""Attention kernels against a loop over requests, heads and query rows. Float32, tolerance 1e-5 absolute."""

import pytest
import torch

from onlinespec.cpu import attention
from onlinespec.cpu.attention import decode_attention_cpu, extend_attention_cpu
from onlinespec.cpu.errors import UnsupportedOnCpuError

NUM_SLOTS, NUM_COLUMNS, DIM = 600, 160, 16
SCALE = DIM**-0.5


class Cache:
    """A filled KV cache whose requests own scattered slots; everything no request owns is NaN."""

    def __init__(self, lengths, heads=4, kv_heads=2, dim_v=DIM, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        num = len(lengths)
        slots = torch.randperm(NUM_SLOTS - 1, generator=generator) + 1
        self.table = torch.zeros(num + 3, NUM_COLUMNS, dtype=torch.int32)
        self.k = torch.full((NUM_SLOTS, kv_heads, DIM), float("nan"), dtype=dtype)
        self.v = torch.full((NUM_SLOTS, kv_heads, dim_v), float("nan"), dtype=dtype)
        self.rows = torch.randperm(num + 3, generator=generator)[:num]
        self.lengths = torch.tensor(lengths)
        for row, length in zip(self.rows.tolist(), lengths, strict=True):
            own, slots = slots[:length], slots[length:]
            self.table[row, :length] = own.int()
            self.k[own] = torch.randn(length, kv_heads, DIM, generator=generator).to(dtype)
            self.v[own] = torch.randn(length, kv_heads, dim_v, generator=generator).to(dtype)
        self.heads, self.generator = heads, generator

    def query(self, num_rows):
        return torch.randn(num_rows, self.heads, DIM, generator=self.generator)

    def attend(self, query_HD, request, is_visible):
        """One query row over the visible positions of one request, head by head."""
        out = []
        for head in range(self.heads):
            kv_head = head // (self.heads // self.k.shape[1])
            slots = self.table[self.rows[request], : int(self.lengths[request])].long()
            positions = [p for p in range(len(slots)) if is_visible(p)]
            k, v = self.k[slots[positions], kv_head].float(), self.v[slots[positions], kv_head].float()
            weights = torch.exp(k @ query_HD[head] * SCALE)
            out.append(weights @ v / weights.sum())
        return torch.stack(out)


def decode(cache, query, key=None, value=None, loc=None, **changes):
    arguments = {
        "k_scale": 1.0,
        "v_scale": 1.0,
        "attn_logits": torch.empty(0),
        "sm_scale": SCALE,
        "logit_cap": 0.0,
        "is_cross_attention": False,
        "sliding_window": 0,
        "encoder_lens": None,
        "sinks": None,
    } | changes
    output = torch.full((query.shape[0], cache.heads, cache.v.shape[2]), float("nan"))
    decode_attention_cpu(
        query=query,
        k_buffer=cache.k,
        v_buffer=cache.v,
        output=output,
        key=key,
        value=value,
        loc=torch.empty(0, dtype=torch.int64) if loc is None else loc,
        req_to_token=cache.table,
        req_pool_indices=cache.rows,
        seq_lens=cache.lengths,
        **arguments,
    )
    return output


def extend(cache, query, rows, tree_mask=None, is_causal=True, **changes):
    arguments = {
        "logit_cap": 0.0,
        "is_cross_attention": False,
        "sliding_window": 0,
        "encoder_lens": None,
        "sinks": None,
        "k_scale": 1.0,
        "v_scale": 1.0,
    } | changes
    output = torch.full((query.shape[0], cache.heads, cache.v.shape[2]), float("nan"))
    extend_attention_cpu(
        query=query,
        key=None,
        value=None,
        output=output,
        k_buffer=cache.k,
        v_buffer=cache.v,
        req_to_token=cache.table,
        req_pool_indices=cache.rows,
        seq_lens=cache.lengths,
        extend_seq_lens=torch.tensor(rows, dtype=torch.int32),
        extend_start_loc=torch.tensor([sum(rows[:i]) for i in range(len(rows))], dtype=torch.int32),
        max_len_extend=max(rows),
        sm_scale=SCALE,
        tree_mask=tree_mask,
        is_causal=is_causal,
        **arguments,
    )
    return output


def expected_extend(cache, query, rows, is_visible):
    """`is_visible(request, row, offset)` says whether a row sees the new row at `offset`; the prefix is always seen."""
    out, packed = [], 0
    for request, num in enumerate(rows):
        prefix = int(cache.lengths[request]) - num
        for row in range(num):

            def sees(position, request=request, row=row, prefix=prefix):
                return position < prefix or is_visible(request, row, position - prefix)

            out.append(cache.attend(query[packed], request, sees))
            packed += 1
    return torch.stack(out)


def causal(request, row, offset):
    return offset <= row


@pytest.fixture(autouse=True)
def _forget_plans(monkeypatch):
    monkeypatch.setattr(attention, "_plans", attention.PlanMemory())


@pytest.mark.parametrize("lengths", [[1], [9], [5, 5, 5], [3, 17, 1, 40], [2, 150, 7]])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (6, 1)])
def test_decode_attends_over_every_cached_row_of_its_own_request(lengths, heads, kv_heads):
    cache = Cache(lengths, heads, kv_heads)
    query = cache.query(len(lengths))

    output = decode(cache, query)

    expected = torch.stack([cache.attend(query[i], i, lambda _: True) for i in range(len(lengths))])
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_decode_far_apart_lengths_are_answered_in_several_calls_with_the_same_result(monkeypatch):
    monkeypatch.setattr(attention, "PADDING_ROWS_PER_CALL", 4)
    cache = Cache([3, 90, 5, 88, 1])
    query = cache.query(5)

    output = decode(cache, query)

    assert attention._split_into_groups([3, 90, 5, 88, 1], [1] * 5) == [[1, 3], [0, 2, 4]]
    expected = torch.stack([cache.attend(query[i], i, lambda _: True) for i in range(5)])
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_decode_stores_the_new_row_before_it_attends():
    cache = Cache([4, 11])
    slots = torch.stack([cache.table[cache.rows[i], cache.lengths[i] - 1] for i in range(2)]).long()
    key, value = torch.randn(2, 2, DIM, generator=cache.generator), torch.randn(2, 2, DIM, generator=cache.generator)
    cache.k[slots] = float("nan")
    query = cache.query(2)

    output = decode(cache, query, key.view(2, -1), value.view(2, -1), slots)

    assert torch.equal(cache.k[slots], key)
    assert torch.equal(cache.v[slots], value)
    expected = torch.stack([cache.attend(query[i], i, lambda _: True) for i in range(2)])
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_decode_takes_values_of_another_width_than_keys():
    cache = Cache([6, 8], dim_v=12)
    query = cache.query(2)

    output = decode(cache, query)

    expected = torch.stack([cache.attend(query[i], i, lambda _: True) for i in range(2)])
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_decode_reads_a_bfloat16_cache():
    cache = Cache([6, 8], dtype=torch.bfloat16)
    query = cache.query(2)

    output = decode(cache, query)

    expected = torch.stack([cache.attend(query[i], i, lambda _: True) for i in range(2)])
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [[4, 4, 4], [1, 1, 1], [12, 12, 12], [3, 30, 5], [20, 1, 20]])
@pytest.mark.parametrize("prefixes", [[0, 0, 0], [7, 7, 7], [0, 19, 3]])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3)])
def test_extend_sees_its_prefix_and_the_new_rows_before_it(rows, prefixes, heads, kv_heads):
    cache = Cache([p + n for p, n in zip(prefixes, rows, strict=True)], heads, kv_heads)
    query = cache.query(sum(rows))

    output = extend(cache, query, rows)

    torch.testing.assert_close(output, expected_extend(cache, query, rows, causal), atol=1e-5, rtol=0)


@pytest.mark.parametrize("padding", [0, 512])
@pytest.mark.parametrize("num_rows", [3, 8])
def test_extend_with_a_tree_sees_its_prefix_and_its_ancestors(monkeypatch, padding, num_rows):
    monkeypatch.setattr(attention, "PADDING_ROWS_PER_CALL", padding)
    rows = [num_rows] * 3
    cache = Cache([num_rows + p for p in (5, 31, 0)])
    tree = torch.rand(3, num_rows, num_rows, generator=cache.generator) < 0.4
    tree |= torch.eye(num_rows, dtype=torch.bool)
    query = cache.query(sum(rows))

    output = extend(cache, query, rows, tree.flatten())

    expected = expected_extend(cache, query, rows, lambda request, row, offset: bool(tree[request, row, offset]))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_attention_that_is_not_causal_is_refused():
    cache = Cache([3])

    with pytest.raises(UnsupportedOnCpuError, match="is_causal = False"):
        extend(cache, cache.query(3), [3], is_causal=False)


def test_a_second_layer_reuses_the_plan_and_a_moved_slot_does_not(monkeypatch):
    calls = []
    real = attention._plan_groups
    monkeypatch.setattr(attention, "_plan_groups", lambda *a: calls.append(1) or real(*a))
    cache = Cache([9, 12])
    query = cache.query(2)

    first = decode(cache, query)
    second = decode(cache, query)
    row, free = int(cache.rows[0]), int(torch.isnan(cache.k[:, 0, 0]).nonzero()[0])
    cache.k[free], cache.v[free] = cache.k[int(cache.table[row, 4])] * 3, cache.v[int(cache.table[row, 4])] * 3
    cache.table[row, 4] = free
    third = decode(cache, query)

    assert len(calls) == 2
    assert torch.equal(first, second)
    expected = torch.stack([cache.attend(query[i], i, lambda _: True) for i in range(2)])
    torch.testing.assert_close(third, expected, atol=1e-5, rtol=0)


def test_a_table_without_a_version_counter_is_planned_every_time():
    with torch.inference_mode():
        cache = Cache([9, 12])
        query = cache.query(2)
        decode(cache, query)
        cache.table[cache.rows[0], 4] = cache.table[cache.rows[0], 5]

        output = decode(cache, query)

        expected = torch.stack([cache.attend(query[i], i, lambda _: True) for i in range(2)])
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("sliding_window", 128),
        ("logit_cap", 30.0),
        ("sinks", torch.zeros(4)),
        ("is_cross_attention", True),
        ("encoder_lens", torch.zeros(1)),
        ("k_scale", 0.5),
        ("v_scale", 0.5),
    ],
)
@pytest.mark.parametrize("kernel", ["decode", "extend"])
def test_an_unsupported_argument_is_refused_by_name(kernel, argument, value):
    cache = Cache([3])
    query = cache.query(1)

    with pytest.raises(UnsupportedOnCpuError, match=rf"sgl_kernel\.{kernel}_attention_cpu .*{argument}"):
        decode(cache, query, **{argument: value}) if kernel == "decode" else extend(
            cache, query, [1], **{argument: value}
        )


def test_a_one_byte_cache_is_refused_by_name():
    cache = Cache([3])
    cache.k = torch.zeros(cache.k.shape, dtype=torch.float8_e4m3fn)

    with pytest.raises(UnsupportedOnCpuError, match="kv cache dtype"):
        decode(cache, cache.query(1))


def test_a_tree_over_requests_with_different_row_counts_is_refused():
    cache = Cache([3, 4])

    with pytest.raises(UnsupportedOnCpuError, match="tree_mask"):
        extend(cache, cache.query(3), [1, 2], torch.ones(5, dtype=torch.bool))
