"""Intervals against tables and tiny loops."""

import math

import pytest

from onlinespec.bench.interval import Interval, mean_interval, ratio_interval, t_quantile

# Any table of Student's t: two-sided 95 %, and 99 % of 10 degrees of freedom.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 10: 2.228, 19: 2.093, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize(("freedom", "wanted"), TABLE.items())
def test_quantiles_of_t_are_those_of_the_tables(freedom: int, wanted: float):
    assert t_quantile(0.95, freedom) == pytest.approx(wanted, abs=6e-4)


def test_another_level_gives_another_quantile():
    assert t_quantile(0.99, 10) == pytest.approx(3.169, abs=6e-4)


def test_the_interval_of_a_mean_is_what_the_loop_over_its_formula_says():
    values = [3.0, 5.0, 4.0, 8.0]

    found = mean_interval(values)

    mean = sum(values) / 4
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 3)
    half = 3.1824 * spread / math.sqrt(4)
    assert found is not None
    assert (found.mean, found.num_values) == (mean, 4)
    assert (found.low, found.high) == (pytest.approx(mean - half, abs=1e-3), pytest.approx(mean + half, abs=1e-3))


def test_one_value_has_a_mean_and_no_interval():
    assert mean_interval([2.0]) == Interval(2.0, None, None, 1)
    assert ratio_interval([3.0], [2.0]) == Interval(pytest.approx(1.5), None, None, 1)


def test_nothing_has_neither():
    assert mean_interval([]) is None
    assert ratio_interval([], []) is None


def test_a_ratio_is_the_geometric_mean_of_its_pairs():
    found = ratio_interval([2.0, 8.0], [1.0, 1.0])

    assert found is not None
    assert found.mean == pytest.approx(4.0)


def test_a_ratio_turned_round_has_its_interval_turned_round():
    over, under = [1.1, 2.3, 0.7, 1.9], [1.0, 1.5, 0.9, 1.2]

    found, turned = ratio_interval(over, under), ratio_interval(under, over)

    assert found is not None
    assert turned is not None
    assert found.low < found.mean < found.high
    assert (1 / turned.high, 1 / turned.mean) == (pytest.approx(found.low), pytest.approx(found.mean))


def test_an_interval_reads_as_its_numbers():
    assert str(Interval(0.98765, 0.9, 1.1, 4)) == "0.988 (0.9 to 1.1)"
    assert str(Interval(2.0, None, None, 1)) == "2"
