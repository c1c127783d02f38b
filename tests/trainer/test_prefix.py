"""Rows of prompts the server did not compute again."""

import random

import pytest
import torch

from onlinespec.trainer.prefix import PrefixRows

ROW_BYTES = 3 * 4 + 384


def build_request(tokens: list[int], num_cached: int = 0):
    """A row depends on all tokens up to it; the first `num_cached` were not captured."""
    tokens_T = torch.tensor(tokens)
    aux_TA = torch.stack(
        [tokens_T.cumsum(0), (tokens_T * torch.arange(1, len(tokens) + 1)).cumsum(0), tokens_T], 1
    ).float()
    has_aux_T = torch.arange(len(tokens)) >= num_cached
    return tokens_T, aux_TA * has_aux_T[:, None], has_aux_T


def test_missing_leading_rows_are_filled_with_those_of_the_same_prefix():
    rows = PrefixRows(2**20)
    rows.store(*build_request([5, 6, 7, 8]))
    tokens_T, aux_TA, has_aux_T = build_request([5, 6, 7, 1, 2], num_cached=3)

    num_completed = rows.complete(tokens_T, aux_TA, has_aux_T)

    assert num_completed == 3
    assert bool(has_aux_T.all())
    assert torch.equal(aux_TA, build_request([5, 6, 7, 1, 2])[1])
    assert (rows.num_hits, rows.num_misses) == (3, 0)


def test_a_row_is_never_taken_from_another_prefix():
    rows = PrefixRows(2**20)
    rows.store(*build_request([5, 6, 7, 8]))
    tokens_T, aux_TA, has_aux_T = build_request([5, 9, 7, 8], num_cached=4)

    assert rows.complete(tokens_T, aux_TA, has_aux_T) == 1
    assert has_aux_T.tolist() == [True, False, False, False]
    assert bool((aux_TA[1:] == 0).all())
    assert (rows.num_hits, rows.num_misses) == (1, 3)


def test_rows_that_were_captured_and_gaps_further_on_are_left_alone():
    rows = PrefixRows(2**20)
    rows.store(*build_request([5, 6, 7, 8]))
    tokens_T, aux_TA, has_aux_T = build_request([5, 6, 7, 8], num_cached=1)
    has_aux_T[2] = False
    aux_TA[1] = -1.0

    assert rows.complete(tokens_T, aux_TA, has_aux_T) == 1
    assert has_aux_T.tolist() == [True, True, False, True]
    assert aux_TA[1].tolist() == [-1.0, -1.0, -1.0]


def test_memory_is_bounded_and_the_least_used_go_first_from_their_ends():
    first, second, third = (list(range(start, start + 32)) for start in (100, 200, 300))
    rows = PrefixRows(4 * 16 * ROW_BYTES)
    rows.store(*build_request(first))
    rows.store(*build_request(second))
    rows.complete(*build_request(first, num_cached=32))

    rows.store(*build_request(third[:10]))

    assert rows.num_bytes == (3 * 16 + 10) * ROW_BYTES
    assert len(rows) == 3 * 16 + 10
    assert rows.complete(*build_request(first, num_cached=32)) == 32
    assert rows.complete(*build_request(third[:10], num_cached=10)) == 10
    _, _, has_aux_T = request = build_request(second, num_cached=32)
    assert rows.complete(*request) == 16
    assert has_aux_T.tolist() == [True] * 16 + [False] * 16


@pytest.mark.parametrize("seed", range(20))
def test_completed_rows_are_those_of_a_dictionary_of_whole_prefixes(seed: int):
    rng = random.Random(seed)
    rows, known = PrefixRows(2**20), {}
    for _ in range(30):
        tokens = [rng.choice([1, 1, 1, 2]) for _ in range(rng.randrange(1, 60))]
        tokens_T, aux_TA, has_aux_T = build_request(tokens)
        has_aux_T &= torch.rand(len(tokens), generator=torch.Generator().manual_seed(rng.randrange(999))) < 0.9
        start = rng.randrange(len(tokens))
        rows.store(tokens_T, aux_TA[start:], has_aux_T[start:], start=start)
        known.update({tuple(tokens[: p + 1]): aux_TA[p] for p in range(start, len(tokens)) if has_aux_T[p]})
        asked = [rng.choice([1, 1, 1, 2]) for _ in range(rng.randrange(1, 60))]
        num_cached = rng.randrange(len(asked) + 1)
        asked_T, found_TA, found_T = build_request(asked, num_cached)
        wanted = [tuple(asked[: p + 1]) in known for p in range(num_cached)]

        assert rows.complete(asked_T, found_TA, found_T) == sum(wanted)
        assert found_T.tolist() == wanted + [True] * (len(asked) - num_cached)
        assert torch.equal(found_TA, build_request(asked)[1] * found_T[:, None])
    assert len(rows) == len(known)
    assert rows.num_bytes == len(known) * ROW_BYTES


def test_rows_stored_in_chunks_complete_the_whole_prefix_and_do_not_count_twice():
    rows = PrefixRows(2**20)
    tokens_T, aux_TA, _ = build_request([1, 2, 3, 4])
    rows.store(tokens_T[:2], aux_TA[:2], torch.ones(2, dtype=torch.bool))
    rows.store(tokens_T, aux_TA, torch.arange(4) >= 2)
    rows.store(tokens_T, aux_TA, torch.ones(4, dtype=torch.bool))

    assert rows.num_bytes == 4 * ROW_BYTES
    assert rows.complete(*build_request([1, 2, 3, 4], num_cached=4)) == 4


def test_stored_rows_do_not_change_with_the_tensor_they_came_from():
    rows = PrefixRows(2**20)
    tokens_T, aux_TA, has_aux_T = build_request([1, 2])
    rows.store(tokens_T, aux_TA, has_aux_T)
    aux_TA.zero_()

    _, found, _ = request = build_request([1, 2], num_cached=2)
    rows.complete(*request)

    assert torch.equal(found, build_request([1, 2])[1])


def test_no_bytes_keep_nothing_and_clear_forgets():
    nothing, rows = PrefixRows(0), PrefixRows(2**20)
    nothing.store(*build_request([1, 2]))
    rows.store(*build_request([1, 2]))
    rows.clear()

    assert len(nothing) == len(rows) == rows.num_bytes == 0
    assert rows.complete(*build_request([1, 2], num_cached=2)) == 0
