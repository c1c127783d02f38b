"""The e-process: exactness against a tiny loop, false promotions, power."""

import math

import numpy as np
import pytest

from onlinespec.gate.eprocess import Bernstein, Betting, build_test

PAIRED_SD = 0.22
DRAFT_STEPS = 3
MIN_GAIN = 0.02


def requests_to_reject(values_SN, alpha, test=Betting, threshold=MIN_GAIN):
    """Requests seen at each stream's first rejection; inf where there is none."""
    evidence = test(float(DRAFT_STEPS), threshold)
    found_S = np.full(len(values_SN), np.inf)
    for number, value_S in enumerate(values_SN.T, start=1):
        evidence.observe(value_S)
        found_S[np.isinf(found_S) & evidence.has_rejected(alpha)] = number
    return found_S


def streams(mean, num_streams, num_requests, seed):
    random = np.random.default_rng(seed)
    values_SN = random.normal(mean, PAIRED_SD, (num_streams, num_requests))
    return np.clip(values_SN, -DRAFT_STEPS, DRAFT_STEPS)


def most_false(num_streams, alpha):
    """Alpha and three standard deviations of a binomial."""
    return num_streams * alpha + 3 * (num_streams * alpha * (1 - alpha)) ** 0.5


def test_wealth_is_the_product_of_bets_made_from_the_past_alone():
    differences = np.random.default_rng(0).uniform(-3.0, 3.0, 50).tolist()
    evidence = Betting(3.0, MIN_GAIN)

    wealth = 1.0
    for number, difference in enumerate(differences):
        past = [value - MIN_GAIN for value in differences[:number]]
        mean_square = 8 * (0.05 + 0.3**2) + sum(value * value for value in past)
        bet = min(max((8 * 0.3 + sum(past)) / mean_square, 0.0), 0.95 / 3.02)
        assert evidence.bet == pytest.approx(bet, rel=1e-12)
        wealth *= 1.0 + bet * (difference - MIN_GAIN)
        evidence.observe(difference)

    assert evidence.e_value == pytest.approx(wealth, rel=1e-9)


def test_empirical_bernstein_is_the_product_of_its_factors_made_from_the_past_alone():
    differences = np.random.default_rng(0).uniform(-1.0, 1.5, 50).tolist()
    evidence = Bernstein(3.0, MIN_GAIN)

    log_wealth, deviations = 0.0, 8 * 0.05
    for number, difference in enumerate(differences):
        past = [value - MIN_GAIN for value in differences[:number]]
        mean = sum(past) / (number + 8)
        scale = 3.02 + mean
        gain = max(8 * 0.3 + sum(past), 0.0) * scale
        bet = min(gain / (gain + deviations), 0.95)
        excess = difference - MIN_GAIN
        y = (excess - mean) / scale
        log_wealth += bet * excess / scale - y * y * (-math.log(1 - bet) - bet)
        deviations += (excess - mean) ** 2
        evidence.observe(difference)

    assert evidence.log_wealth == pytest.approx(log_wealth, rel=1e-9)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("past", [[], [3.0] * 20, [-3.0] * 20, [0.3] * 20])
@pytest.mark.parametrize("test", ["betting", "bernstein"])
def test_no_factor_has_a_mean_above_one_where_the_next_mean_is_the_threshold(test, past, share):
    # Of all distributions with that mean those on two points are the extremes: the lowest difference, and one above.
    threshold = 0.02
    high = min((threshold + 3.0 * share) / (1 - share), 3.0)
    share = (high - threshold) / (high + 3.0)
    factors = []
    for value in (-3.0, high):
        evidence = build_test(test, 3.0, threshold)
        for earlier in past:
            evidence.observe(earlier)
        before = evidence.log_wealth
        evidence.observe(value)
        factors.append(math.exp(evidence.log_wealth - before))

    assert share * factors[0] + (1 - share) * factors[1] <= 1.0 + 1e-12


@pytest.mark.parametrize("test", ["betting", "bernstein"])
def test_many_streams_at_once_are_what_each_is_alone(test):
    values_SN = streams(0.1, 5, 80, seed=4)
    together, alone = build_test(test, 3.0, MIN_GAIN), [build_test(test, 3.0, MIN_GAIN) for _ in values_SN]

    for value_S in values_SN.T:
        together.observe(value_S)
    for evidence, values in zip(alone, values_SN.tolist(), strict=True):
        for value in values:
            evidence.observe(value)

    np.testing.assert_allclose(together.log_wealth, [evidence.log_wealth for evidence in alone], rtol=1e-12)
    assert together.has_rejected(0.5).tolist() == [bool(evidence.has_rejected(0.5)) for evidence in alone]


@pytest.mark.parametrize("test", [Betting, Bernstein])
def test_the_worst_differences_leave_some_wealth(test):
    evidence = test(3.0, MIN_GAIN)

    for difference in (-3.0, -3.0, 3.0, -3.0):
        evidence.observe(difference)

    assert evidence.bet >= 0.0
    assert 0.0 < evidence.e_value < 1.0


def test_an_overwhelming_e_value_stays_finite():
    evidence = Betting(3.0, 0.0)

    for _ in range(5000):
        evidence.observe(3.0)

    assert math.isfinite(evidence.e_value)
    assert evidence.has_rejected(1e-300)


@pytest.mark.parametrize("test", [Betting, Bernstein])
def test_a_difference_beyond_the_bound_counts_as_the_bound(test):
    beyond, at = test(1.0, MIN_GAIN), test(1.0, MIN_GAIN)

    for difference in (0.3, 2.5, -1.7, 0.1):
        beyond.observe(difference)
        at.observe(min(max(difference, -1.0), 1.0))

    assert beyond.e_value == at.e_value


@pytest.mark.parametrize("test", [Betting, Bernstein])
@pytest.mark.parametrize(("mean", "threshold"), [(0.0, MIN_GAIN), (MIN_GAIN, MIN_GAIN), (-0.2, -0.2)])
def test_looking_after_every_request_promotes_noise_less_often_than_alpha(test, mean, threshold):
    alpha, num_streams = 0.05, 2000

    found_S = requests_to_reject(streams(mean, num_streams, 1000, seed=1), alpha, test, threshold)

    assert np.isfinite(found_S).sum() <= most_false(num_streams, alpha)


@pytest.mark.parametrize("test", [Betting, Bernstein])
def test_skewed_noise_is_promoted_less_often_than_alpha(test):
    # Small gains nearly always, a total loss at times: the mean is exactly what H0 allows.
    alpha, num_streams = 0.05, 2000
    loss, gain = -3.0, 0.1
    share = (gain - MIN_GAIN) / (gain - loss)
    losing_SN = np.random.default_rng(2).random((num_streams, 600)) < share

    found_S = requests_to_reject(np.where(losing_SN, loss, gain), alpha, test)

    assert np.isfinite(found_S).sum() <= most_false(num_streams, alpha)


@pytest.mark.parametrize(("mean", "most_requests"), [(0.1, 180), (0.2, 75), (0.5, 27), (1.0, 15)])
def test_a_real_gain_is_promoted_within_few_requests(mean, most_requests):
    found_S = requests_to_reject(streams(mean, 200, 1000, seed=3), 0.05)

    assert np.isfinite(found_S).all()
    assert np.median(found_S) <= most_requests


def test_the_conservative_test_asks_more_requests_and_still_finds_the_gain():
    values_SN = streams(0.1, 200, 1000, seed=3)

    bold_S, careful_S = requests_to_reject(values_SN, 0.05), requests_to_reject(values_SN, 0.05, Bernstein)

    assert np.isfinite(careful_S).all()
    assert np.median(bold_S) < np.median(careful_S) < 2 * np.median(bold_S)
