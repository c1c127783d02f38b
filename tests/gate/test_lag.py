"""When cached prefixes are worth computing anew."""

import pytest

from onlinespec.gate.lag import NUM_REQUESTS, Lag


def lagging(tolerance_tokens: float = 0.1, difference: float = -0.2, num: int = NUM_REQUESTS) -> Lag:
    lag = Lag(tolerance_tokens)
    for _ in range(num):
        lag.observe(difference)
    return lag


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, True),
        ({"difference": -0.09}, False),
        ({"difference": 0.5}, False),
        ({"num": NUM_REQUESTS - 1}, False),
        ({"tolerance_tokens": 0.0}, False),
    ],
    ids=["a loss", "one that is borne", "a gain", "too few requests", "never asked for"],
)
def test_a_mean_loss_over_enough_requests_is_due(changes: dict, wanted: bool):
    assert lagging(**changes).is_due(version=3) == wanted


def test_the_mean_is_of_the_last_requests_whichever_version_served_them():
    lag = lagging(difference=0.0)
    for _ in range(NUM_REQUESTS):
        lag.observe(-0.5)

    assert lag.mean_tokens == pytest.approx(-0.5)


def test_a_version_is_renewed_for_once_and_what_was_seen_before_counts_no_more():
    lag = lagging()

    lag.renewed(3, now_s=50.0)

    assert lag.renewed_s == 50.0
    assert lag.mean_tokens == 0.0
    for _ in range(NUM_REQUESTS):
        lag.observe(-0.2)
    assert not lag.is_due(version=3)
    assert lag.is_due(version=4)
