"""The e-process: exactness against a tiny loop, false promotions, power."""

import math

import numpy as np
import pytest

from onlinespec.gate.eprocess import EProcess

PAIRED_SD = 0.22
DRAFT_STEPS = 3
MIN_GAIN = 0.02


def requests_to_reject(differences, alpha, num_draft_steps=DRAFT_STEPS):
    """Requests seen at the first rejection; None where there is none."""
    evidence = EProcess(float(num_draft_steps), MIN_GAIN)
    for number, difference in enumerate(differences, start=1):
        evidence.observe(difference)
        if evidence.has_rejected(alpha):
            return number
    return None


def streams(mean, num_streams, num_requests, seed):
    random = np.random.default_rng(seed)
    values = random.normal(mean, PAIRED_SD, (num_streams, num_requests))
    return np.clip(values, -DRAFT_STEPS, DRAFT_STEPS).tolist()


def test_wealth_is_the_product_of_bets_made_from_the_past_alone():
    differences = np.random.default_rng(0).uniform(-3.0, 3.0, 50).tolist()
    evidence = EProcess(3.0, MIN_GAIN)

    wealth = 1.0
    for number, difference in enumerate(differences):
        past = [value - MIN_GAIN for value in differences[:number]]
        mean_square = 8 * (0.05 + 0.3**2) + sum(value * value for value in past)
        bet = min(max((8 * 0.3 + sum(past)) / mean_square, 0.0), 0.95 / 3.02)
        assert evidence.bet == pytest.approx(bet, rel=1e-12)
        wealth *= 1.0 + bet * (difference - MIN_GAIN)
        evidence.observe(difference)

    assert evidence.e_value == pytest.approx(wealth, rel=1e-9)


def test_the_worst_differences_leave_some_wealth():
    evidence = EProcess(3.0, MIN_GAIN)

    for difference in (-3.0, -3.0, 3.0, -3.0):
        evidence.observe(difference)

    assert evidence.bet >= 0.0
    assert 0.0 < evidence.e_value < 1.0


def test_an_overwhelming_e_value_stays_finite():
    evidence = EProcess(3.0, 0.0)

    for _ in range(5000):
        evidence.observe(3.0)

    assert math.isfinite(evidence.e_value)
    assert evidence.has_rejected(1e-300)


def test_a_difference_beyond_the_draft_steps_is_our_own_fault():
    with pytest.raises(AssertionError):
        EProcess(3.0, MIN_GAIN).observe(3.01)


@pytest.mark.parametrize("mean", [0.0, MIN_GAIN])
def test_looking_after_every_request_promotes_noise_less_often_than_alpha(mean):
    alpha, num_streams = 0.05, 1000

    promoted = [requests_to_reject(stream, alpha) for stream in streams(mean, num_streams, 1000, seed=1)]

    num_false = sum(number is not None for number in promoted)
    # Alpha and three standard deviations of a binomial.
    assert num_false <= num_streams * alpha + 3 * (num_streams * alpha * (1 - alpha)) ** 0.5


def test_skewed_noise_is_promoted_less_often_than_alpha():
    # Small gains nearly always, a total loss at times: the mean is exactly what H0 allows.
    alpha, num_streams = 0.05, 1000
    loss, gain = -3.0, 0.1
    share = (gain - MIN_GAIN) / (gain - loss)
    random = np.random.default_rng(2)
    losing = random.random((num_streams, 600)) < share

    promoted = [requests_to_reject(stream, alpha) for stream in np.where(losing, loss, gain).tolist()]

    num_false = sum(number is not None for number in promoted)
    assert num_false <= num_streams * alpha + 3 * (num_streams * alpha * (1 - alpha)) ** 0.5


@pytest.mark.parametrize(("mean", "most_requests"), [(0.1, 180), (0.2, 75), (0.5, 27), (1.0, 15)])
def test_a_real_gain_is_promoted_within_few_requests(mean, most_requests):
    promoted = [requests_to_reject(stream, 0.05) for stream in streams(mean, 200, 1000, seed=3)]

    assert all(number is not None for number in promoted)
    assert np.median(promoted) <= most_requests
