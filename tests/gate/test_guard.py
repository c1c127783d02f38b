"""Harm in service is found within few requests; health, luck and hard traffic are not blamed."""

import json
import statistics

import msgspec
import numpy as np
import pytest

from onlinespec.config import GuardConfig
from onlinespec.gate.guard import Detector, Guard, Walked, WatchedRequest, watched_steps

CONFIG = GuardConfig()
STEPS = 100


def walked(accept_length: float) -> Walked:
    return Walked(round(STEPS * accept_length), STEPS)


def integrity(number: int, live: float, expected: float, age: str = "clean") -> WatchedRequest:
    return WatchedRequest(b"%d" % number, age, live=walked(live), expected=walked(expected))


def quality(number: int, shadow: float, parent: float) -> WatchedRequest:
    return WatchedRequest(b"%d" % number, "excluded", shadow=walked(shadow), parent=walked(parent))


def requests_to_trip(guard: Guard, requests) -> int | None:
    for number, request in enumerate(requests, start=1):
        if guard.observe(request, now_s=0.0):
            return number
    return None


def accept_lengths(rng: np.random.Generator, mean: float, num: int, spread: float = 0.4) -> np.ndarray:
    return rng.normal(mean, spread, num).clip(1.0, 4.0)


@pytest.mark.parametrize(("age", "most"), [("clean", 15), ("aged", 20)])
def test_a_draft_damaged_in_memory_is_found_within_few_requests_after_long_health(age: str, most: int):
    delays = []
    for seed in range(20):
        rng, guard = np.random.default_rng(seed), Guard(CONFIG, 2, 1)
        expected = accept_lengths(rng, 2.5, 2000)
        stale = 0.1 if age == "aged" else 0.0
        live = expected + rng.normal(-stale, 0.05, 2000)
        healthy = [integrity(n, *pair, age) for n, pair in enumerate(zip(live, expected, strict=True))]
        assert requests_to_trip(guard, healthy) is None

        damaged = [integrity(n, 1.0, e, age) for n, e in enumerate(expected[:100])]
        delays.append(requests_to_trip(guard, damaged))

    assert statistics.median(delays) <= most
    assert max(delays) <= most + 5
    assert (guard.verdict.harm, guard.verdict.detector) == ("integrity", age)


def test_traffic_that_turns_hard_is_not_blamed():
    for seed in range(10):
        rng, guard = np.random.default_rng(seed), Guard(CONFIG, 2, 1)
        parent = np.concatenate([accept_lengths(rng, 2.5, 500), accept_lengths(rng, 1.4, 1500)])
        shadow = (parent + rng.normal(0.0, 0.3, 2000)).clip(1.0, 4.0)
        live = shadow + rng.normal(0.0, 0.03, 2000)
        requests = [
            WatchedRequest(b"%d" % n, "clean", *(walked(value) for value in values))
            for n, values in enumerate(zip(shadow, parent, live, shadow, strict=True))
        ]

        assert requests_to_trip(guard, requests) is None


@pytest.mark.parametrize(("loss", "most"), [(0.2, 400), (0.3, 150), (0.6, 60)])
def test_a_version_that_became_worse_than_its_parent_is_found(loss: float, most: int):
    delays = []
    for seed in range(20):
        rng, guard = np.random.default_rng(seed), Guard(CONFIG, 2, 1)
        parent = accept_lengths(rng, 2.5, 3000)
        effect = np.where(np.arange(3000) < 1000, 0.1, -loss)
        shadow = (parent + effect + rng.normal(0.0, 0.3, 3000)).clip(1.0, 4.0)
        requests = [quality(n, *pair) for n, pair in enumerate(zip(shadow, parent, strict=True))]
        delays.append(requests_to_trip(guard, requests) - 1000)

    assert min(delays) > 0
    assert statistics.median(delays) <= most
    assert guard.verdict.harm == "quality"


def test_the_chance_of_an_alarm_by_luck_is_within_its_bound_at_the_edge_of_harm():
    """At most n / false_alarm_requests: 400 lives of 1,000 requests against 4,000, for one detector of two: 1 / 8."""
    config = msgspec.structs.replace(CONFIG, false_alarm_requests=4000)
    alarms = 0
    for seed in range(400):
        differences = np.random.default_rng(seed).choice([-0.5, 0.3], 1000)  # mean -0.1, the tolerance
        alarms += trips(Detector(0.1, 1.0), differences, 2.0 * config.false_alarm_requests)

    assert 0 < alarms / 400 <= 1 / 8 + 3 * (1 / 8 * 7 / 8 / 400) ** 0.5


def test_health_is_not_blamed_in_a_hundred_thousand_requests():
    rng = np.random.default_rng(5)

    assert not trips(Detector(0.1, 1.0), rng.normal(0.0, 0.3, 100_000), 2e7)
    assert not trips(Detector(0.1, 0.25), rng.normal(0.0, 0.05, 100_000), 2e7)
    assert not trips(Detector(0.3, 0.25), rng.normal(-0.1, 0.15, 100_000), 2e7)


def trips(detector: Detector, differences: np.ndarray, threshold: float) -> bool:
    for difference in differences.tolist():
        detector.observe(difference)
        if detector.evidence >= threshold:
            return True
    return False


def test_evidence_is_the_sum_over_starts_of_products_of_factors():
    differences = np.random.default_rng(2).normal(-0.2, 0.5, 12).tolist()
    detector = Detector(0.1, 0.4)

    for difference in differences:
        detector.observe(difference)

    wanted = []
    for share in (1.0, 0.5, 0.25, 0.125):
        bet = share * 0.95 / (0.4 + 0.1)
        factors = [1 + bet * (-min(difference, 0.4) - 0.1) for difference in differences]
        wanted.append(sum(np.prod(factors[start:]) for start in range(12)))
    assert detector.evidence == pytest.approx(np.mean(wanted))


def test_evidence_grows_by_one_a_request_in_the_mean_where_harm_is_exactly_tolerated():
    """The property all bounds rest on: E[M_n] = n."""
    total = 0.0
    for seed in range(4000):
        detector = Detector(0.1, 1.0)
        for difference in np.random.default_rng(seed).choice([-0.3, 0.1], 10).tolist():
            detector.observe(difference)
        total += detector.evidence

    assert total / 4000 == pytest.approx(10.0, rel=0.05)


def test_turns_of_one_conversation_count_once_for_quality_and_each_for_integrity():
    guard = Guard(CONFIG, 2, 1)

    for _ in range(5):
        guard.observe(WatchedRequest(b"one", "clean", *[walked(2.0)] * 4), now_s=0.0)

    assert guard.detectors["quality"].num_requests == 1
    assert guard.detectors["clean"].num_requests == 5
    assert guard.num_repeated == 4


def test_a_conversation_counts_again_once_it_is_long_forgotten():
    guard = Guard(CONFIG, 2, 1)
    for number in range(4097):
        guard.observe(quality(number, 2.0, 2.0), now_s=0.0)

    guard.observe(quality(0, 2.0, 2.0), now_s=0.0)

    assert guard.detectors["quality"].num_requests == 4098


def test_a_conversation_that_goes_on_is_not_forgotten():
    guard = Guard(CONFIG, 2, 1)
    for number in [*range(4096), 0, 4096]:
        guard.observe(quality(number, 2.0, 2.0), now_s=0.0)

    guard.observe(quality(0, 2.0, 2.0), now_s=0.0)

    assert guard.num_repeated == 2


def test_requests_that_say_nothing_are_counted_and_move_nothing():
    guard = Guard(CONFIG, 2, 1)

    guard.observe(WatchedRequest(b"a", "excluded", live=walked(1.0), expected=walked(3.0)), now_s=0.0)
    guard.observe(WatchedRequest(b"b", "clean", live=Walked(0, 0), expected=walked(3.0)), now_s=0.0)
    guard.observe(WatchedRequest(b"c", "clean"), now_s=0.0)
    guard.observe(WatchedRequest(b"d", "clean", shadow=walked(1.0)), now_s=0.0)

    assert guard.num_excluded == 4
    assert [detector.num_requests for detector in guard.detectors.values()] == [0, 0, 0]


STALE = {"version": 2, "num_draft_steps": 3, "is_complete": True, "has_stale_prefix": True}
FRESH = STALE | {"has_stale_prefix": False}


@pytest.mark.parametrize(
    ("versions", "is_mixed", "num_drafted", "facts", "wanted"),
    [
        ([2, 2, 2], [False] * 3, [3] * 3, FRESH, ("clean", 0)),
        ([2, 2, 2], [False] * 3, [3] * 3, STALE, ("aged", 0)),
        ([1, 1, 2, 2], [False, False, True, False], [3] * 4, FRESH, ("aged", 3)),
        ([2, 2], [True, False], [3] * 2, FRESH, ("aged", 1)),
        ([1, 1], [False] * 2, [3] * 2, FRESH, ("excluded", 2)),
        ([2, 2, 3], [False, False, True], [3] * 3, FRESH, ("excluded", 3)),
        ([2, 1, 2], [False, True, True], [3] * 3, FRESH, ("excluded", 3)),
        ([2, 2], [False] * 2, [3, 0], FRESH, ("excluded", 2)),
        ([2, 2], [False] * 2, [3] * 2, FRESH | {"is_complete": False}, ("excluded", 2)),
        ([], [], [], FRESH, ("excluded", 0)),
    ],
)
def test_integrity_compares_the_tail_that_one_version_served_at_full_depth(
    versions, is_mixed, num_drafted, facts, wanted
):
    assert watched_steps(versions, is_mixed, num_drafted, **facts) == wanted


def test_at_depth_zero_a_live_accept_length_of_one_is_no_harm():
    guard = Guard(CONFIG, 2, 1)

    for number in range(100):
        age, _ = watched_steps([2] * 50, [False] * 50, [0] * 50, **FRESH)
        guard.observe(integrity(number, 1.0, 2.5, age), now_s=0.0)

    assert guard.verdict is None


def test_a_verdict_says_what_was_seen_and_is_json():
    guard = Guard(CONFIG, 5, 4)
    number = requests_to_trip(guard, [integrity(n, 1.0, 2.5) for n in range(100)])

    read = json.loads(msgspec.json.encode(guard.verdict))

    assert read["num_requests"] == number
    assert (read["version"], read["parent_version"], read["harm"], read["detector"]) == (5, 4, "integrity", "clean")
    assert read["evidence"] >= read["threshold"] == 2e7
    assert read["recent_mean_tokens"] == read["mean_tokens"] == -1.5
    assert "version 5" in read["reason"]
    assert "-1.500 tokens" in read["reason"]
