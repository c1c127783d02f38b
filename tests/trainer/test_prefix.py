"""Rows of prompts the server did not compute again."""

import torch

from onlinespec.trainer.prefix import PrefixRows

ROW_BYTES = 3 * 4 + 256


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
    rows = PrefixRows(6 * ROW_BYTES)
    rows.store(*build_request([1, 2, 3]))
    rows.store(*build_request([4, 5, 6]))
    rows.complete(*build_request([1, 2, 3], num_cached=3))

    rows.store(*build_request([7, 8]))

    assert rows.num_bytes == 6 * ROW_BYTES
    assert len(rows) == 6
    assert rows.complete(*build_request([1, 2, 3], num_cached=3)) == 3
    assert rows.complete(*build_request([7, 8], num_cached=2)) == 2
    _, _, has_aux_T = request = build_request([4, 5, 6], num_cached=3)
    assert rows.complete(*request) == 1
    assert has_aux_T.tolist() == [True, False, False]


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
