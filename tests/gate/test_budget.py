"""The error budget over candidates."""

import pytest

from onlinespec.config import GateConfig
from onlinespec.gate.budget import DAY_S, balance_at, candidate_alpha, may_start

GATE = GateConfig(alpha=0.05, max_false_promotions_per_day=1.0, max_candidates_per_hour=3)


def life(num_candidates, apart_s, gate=GATE):
    """(time, level) of candidates at equal distances."""
    races = []
    for number in range(num_candidates):
        races.append((number * apart_s, candidate_alpha(number * apart_s, races, gate)))
    return races


def test_the_first_candidates_are_tested_at_alpha():
    assert [level for _, level in life(10, 60.0)] == [0.05] * 10


def test_levels_are_a_tenth_of_what_is_left_once_that_is_less_than_alpha():
    races = life(40, 60.0)

    left, expected = 1.0, []
    for number in range(40):
        left = min(1.0, left + 60.0 / DAY_S) if number else 1.0
        expected.append(min(0.05, left / 10))
        left -= expected[-1]
    assert [level for _, level in races] == pytest.approx(expected)
    assert races[-1][1] < 0.01


def test_a_long_life_settles_where_each_candidate_spends_what_accrued_since_the_last():
    races = life(200, 180.0)

    assert races[-1][1] == pytest.approx(180.0 / DAY_S, rel=1e-3)


def test_a_quiet_day_restores_the_whole_budget_and_no_more():
    races = life(200, 60.0)

    end_s = races[-1][0]
    assert balance_at(end_s + DAY_S, races, 1.0) == pytest.approx(1.0)
    assert balance_at(end_s + 30 * DAY_S, races, 1.0) == 1.0


@pytest.mark.parametrize("apart_s", [180.0, 1800.0])
def test_no_window_spends_more_than_it_accrued_and_one_day(apart_s):
    races = life(int(1.5 * DAY_S / apart_s), apart_s)

    for start_s in (0.0, 0.3 * DAY_S, 0.7 * DAY_S):
        for days in (0.02, 0.1, 0.5, 1.0):
            spent = sum(level for time_s, level in races if start_s <= time_s < start_s + days * DAY_S)
            assert spent <= days + 1 + 1e-9


def test_the_rate_is_per_day():
    gate = GateConfig(max_false_promotions_per_day=0.1)

    assert candidate_alpha(0.0, [], gate) == pytest.approx(0.01)


def test_a_clock_that_goes_back_adds_nothing():
    races = [(1000.0, 0.5)]

    assert balance_at(10.0, races, 1.0) == 0.5
    assert balance_at(1000.0, [*races, (10.0, 0.1)], 1.0) == pytest.approx(0.4)


def test_an_hour_sees_no_more_candidates_than_allowed():
    races = [(0.0, 0.01), (1000.0, 0.01), (2000.0, 0.01)]

    assert not may_start(3599.0, races, GATE)
    assert may_start(3600.0, races, GATE)
    assert may_start(2500.0, races[1:], GATE)


def test_no_candidate_starts_where_the_budget_was_cut_below_what_is_spent():
    gate = GateConfig(max_false_promotions_per_day=0.05)
    races = [(0.0, 0.05)]

    assert candidate_alpha(0.0, races, gate) == 0.0
    assert not may_start(0.0, races, gate)
    assert may_start(60.0, races, gate)
