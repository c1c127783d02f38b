"""Intervals against loops, and against what they promise."""

import math
import random

import pytest

from onlinespec.bench.estimate import Estimate, mean_ratio, ratio, ratio_difference, share

T_19 = 2.0930240544
"""Student's t, 19 degrees of freedom, 97.5 %"""


def conversations(seed: int, count: int, depth: int = 3) -> tuple[list[int], list[int]]:
    """(accepted, drafted positions reached) of conversations whose chance of acceptance differs."""
    rng = random.Random(seed)
    accepted, tried = [], []
    for _ in range(count):
        chance, steps = rng.uniform(0.3, 0.9), rng.randrange(5, 40)
        tried.append(steps)
        accepted.append(sum(rng.random() < chance for _ in range(steps)))
    return accepted, tried


def test_a_ratio_is_of_sums_and_its_interval_is_the_linearised_one():
    parts, wholes = conversations(1, 20)

    found = ratio(parts, wholes)

    r, n, squares = sum(parts) / sum(wholes), 20, 0.0
    for y, x in zip(parts, wholes, strict=True):
        squares += (y - r * x) ** 2
    half = T_19 * math.sqrt(n / (n - 1) * squares) / sum(wholes)
    assert (found.value, found.low, found.high) == pytest.approx((r, r - half, r + half))


def test_of_one_conversation_there_is_a_figure_without_an_interval_and_of_none_nothing():
    assert ratio([3], [4]) == Estimate(0.75, None, None)
    assert ratio([], []) is None
    assert ratio([0], [0]) is None
    assert share([3], [4]) == Estimate(0.75, None, None)
    assert mean_ratio([]) is None


def test_a_conversation_that_verified_nothing_does_not_narrow_the_interval():
    assert ratio([1, 5, 0, 0], [4, 6, 0, 0]) == ratio([1, 5], [4, 6])


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    everything = conversations(0, 20_000)
    truth = sum(everything[0]) / sum(everything[1])
    intervals = [ratio(*conversations(seed, 40)) for seed in range(1, 301)]

    held = sum(found.low <= truth <= found.high for found in intervals)

    assert 0.91 < held / 300 < 0.99


def test_positions_too_and_counting_every_step_as_a_draw_would_not():
    everything = conversations(0, 20_000)
    truth = sum(everything[0]) / sum(everything[1])
    held_clustered = held_naive = 0
    for seed in range(1, 301):
        parts, wholes = conversations(seed, 40)
        found, p, n = share(parts, wholes), sum(parts) / sum(wholes), sum(wholes)
        held_clustered += found.low <= truth <= found.high
        held_naive += abs(p - truth) <= 1.96 * math.sqrt(p * (1 - p) / n)

    assert 0.91 < held_clustered / 300 < 0.99
    assert held_naive / 300 < 0.85


def test_where_all_were_accepted_each_conversation_counts_as_one_trial():
    found = share([10] * 8, [10] * 8)

    t = 2.3646242510
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(8 / (8 + t * t)), "Wilson's of 8 successes of 8"


def test_a_paired_difference_is_narrower_than_the_two_apart():
    parts, wholes = conversations(3, 60)
    better = [part + whole * 0.05 for part, whole in zip(parts, wholes, strict=True)]

    found = ratio_difference(parts, wholes, better, wholes)

    alone = ratio(parts, wholes)
    assert found.value == pytest.approx(0.05)
    assert found.high - found.low < 1e-9 < (alone.high - alone.low) / 2
    assert ratio_difference(parts, [0] * 60, better, wholes) is None


def test_a_difference_of_a_from_b_is_b_less_a():
    found = ratio_difference([1, 2, 3], [4, 4, 4], [3, 3, 3], [4, 5, 4])

    assert found.value == pytest.approx(9 / 13 - 6 / 12)
    assert found.low < found.value < found.high


def test_a_mean_ratio_is_the_geometric_mean():
    found = mean_ratio([math.log(2), math.log(8)])

    assert found.value == pytest.approx(4)
    assert found.low < 2
    assert found.high > 8
