"""The error budget over candidates."""

import numpy as np
import pytest

from onlinespec.gate.budget import candidate_alpha, gamma


def test_the_shares_of_all_candidates_sum_to_one():
    partial = sum(gamma(candidate) for candidate in range(1, 10_001))

    # The sum telescopes: what is left beyond n candidates is 5 / (n + 5).
    assert partial == pytest.approx(1.0 - 5 / 10_005, abs=1e-12)


def test_without_a_promotion_all_levels_together_stay_within_alpha():
    assert sum(candidate_alpha(0.05, number, 0) for number in range(10_000)) < 0.05


def test_promotions_buy_level_back():
    levels = [candidate_alpha(0.05, number, number) for number in range(30)]

    assert min(levels) > 0.05 / 8
    assert candidate_alpha(0.05, 20, 12) == pytest.approx(13 * candidate_alpha(0.05, 20, 0))


def test_half_of_the_candidates_winning_keeps_a_sixteenth_of_alpha():
    assert min(candidate_alpha(0.05, number, number // 2) for number in range(30)) > 0.05 / 16


def test_more_promotions_than_candidates_is_our_own_fault():
    with pytest.raises(AssertionError):
        candidate_alpha(0.05, 2, 3)


@pytest.mark.parametrize("null_share", [0.5, 0.9, 1.0])
def test_the_share_of_false_promotions_stays_below_alpha(null_share):
    # Null e-values that are as large as they may be: 1/level with probability level, else nothing.
    alpha, random = 0.2, np.random.default_rng(4)
    proportions = []
    for _ in range(4000):
        num_true = num_false = 0
        for number in range(30):
            level = candidate_alpha(alpha, number, num_true + num_false)
            if random.random() >= null_share:
                num_true += 1
            elif random.random() < level:
                num_false += 1
        proportions.append(num_false / max(num_true + num_false, 1))

    slack = 3 * np.std(proportions) / len(proportions) ** 0.5
    assert np.mean(proportions) <= alpha + slack
