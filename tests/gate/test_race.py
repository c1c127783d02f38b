"""A race between a candidate and the incumbent, request by request."""

import math

import msgspec
import numpy as np
import pytest

from onlinespec.config import GateConfig
from onlinespec.gate.race import Race
from onlinespec.gate.verdict import Verdict, barred_reason

FROZEN_S = 1000.0
NUM_STEPS = 100


def race(alpha=0.05, num_draft_steps=3, was_trained_on=lambda key: False, **config):
    return Race(
        "candidate",
        "incumbent",
        num_draft_steps,
        alpha,
        GateConfig(**config),
        frozen_at_s=FROZEN_S,
        was_trained_on=was_trained_on,
    )


def feed(contest, incumbent_tokens, candidate_tokens, request=0):
    """One conversation of 100 steps on either side, so that tokens are hundredths of accept length."""
    group, now_s = b"%d" % request, FROZEN_S + request
    contest.admits(FROZEN_S + 1.0, group, (request,))
    return contest.observe(request, incumbent_tokens, NUM_STEPS, candidate_tokens, NUM_STEPS, group, now_s=now_s)


def run(contest, gains):
    """Feed gains in tokens per step until a verdict; None where none comes."""
    for request, gain in enumerate(gains):
        verdict = feed(contest, 200, 200 + round(gain * NUM_STEPS), request)
        if verdict is not None:
            return verdict
    return None


def test_a_clear_gain_is_promoted_with_its_numbers():
    verdict = run(race(), [0.5] * 100)

    assert verdict.decision == "promote"
    assert verdict.e_value >= verdict.threshold == pytest.approx(20.0)
    assert verdict.mean_gain_tokens == pytest.approx(0.5)
    assert verdict.interval_tokens == pytest.approx((0.5, 0.5))
    assert (verdict.accept_length_incumbent, verdict.accept_length_candidate) == (2.0, 2.5)
    assert verdict.num_requests == 22
    assert verdict.frozen_at_s == FROZEN_S
    assert verdict.decided_at_s == FROZEN_S + 21


def test_a_promotion_waits_for_the_least_number_of_requests():
    assert run(race(min_requests=30), [1.0] * 100).num_requests == 30
    assert run(race(min_requests=1), [1.0] * 100).num_requests < 30


def test_evidence_that_was_lost_again_before_the_least_number_of_requests_does_not_promote():
    contest = race(min_requests=14, futility_requests=14)

    verdict = run(contest, [3.0] * 6 + [-3.0] * 8)

    assert verdict.decision == "drop"


def test_a_candidate_that_is_no_better_is_dropped_at_the_futility_look():
    verdict = run(race(futility_requests=24), [0.01] * 100)

    assert verdict.decision == "drop"
    assert verdict.num_requests == 24
    assert "not above 0.02" in verdict.reason


def test_an_undecided_candidate_is_dropped_at_the_last_request():
    verdict = run(race(max_requests=40, alpha=0.001), [0.05] * 100)

    assert verdict.decision == "drop"
    assert verdict.num_requests == 40


def test_the_gain_is_the_mean_over_requests_and_accept_length_is_weighted_by_steps():
    contest = race(futility_requests=2, min_requests=2)
    contest.admits(FROZEN_S + 1, b"a", (1,))
    contest.admits(FROZEN_S + 1, b"b", (1,))

    contest.observe(0, 10, 10, 10, 5, b"a", now_s=0.0)
    verdict = contest.observe(1, 300, 100, 300, 300, b"b", now_s=0.0)

    assert verdict.mean_gain_tokens == pytest.approx(((2.0 - 1.0) + (1.0 - 3.0)) / 2)
    assert verdict.accept_length_incumbent == pytest.approx(310 / 110)
    assert verdict.accept_length_candidate == pytest.approx(310 / 305)


def test_the_interval_is_the_normal_approximation_of_the_mean():
    gains = np.round(np.random.default_rng(5).normal(0.0, 0.3, 24), 2).tolist()
    contest = race(futility_requests=24, min_gain_tokens=2.0)

    verdict = run(contest, gains)

    half = 1.96 * np.std(gains, ddof=1) / math.sqrt(24)
    assert verdict.interval_tokens == pytest.approx((np.mean(gains) - half, np.mean(gains) + half))


def test_a_request_that_began_before_the_candidate_was_frozen_does_not_count():
    contest = race()

    assert not contest.admits(FROZEN_S - 1.0, b"g", (1,))
    assert not contest.admits(FROZEN_S, b"g", (1,))
    assert contest.admits(FROZEN_S + 0.001, b"g", (1,))
    assert contest.num_dropped_early == 2


def test_a_conversation_counts_once():
    contest = race()

    admitted = [
        contest.admits(FROZEN_S + 1, group, answer)
        for group, answer in [(b"g", (1,)), (b"g", (1,)), (b"g", (2,)), (b"h", (1,))]
    ]

    assert admitted == [True, False, False, True]
    assert contest.num_dropped_duplicates == 2


def test_an_answer_that_training_has_seen_does_not_count():
    contest = race(was_trained_on=lambda key: key == (1, 2))

    assert not contest.admits(FROZEN_S + 1, b"g", (1, 2))
    assert contest.admits(FROZEN_S + 1, b"g", (1, 3))
    assert contest.num_dropped_trained == 1


def test_a_request_without_a_verify_step_is_counted_and_ignored():
    contest = race()
    contest.admits(FROZEN_S + 1, b"g", (1,))

    assert contest.observe(0, 0, 0, 0, 0, b"g", now_s=0.0) is None
    assert (contest.num_requests, contest.num_dropped_empty) == (0, 1)


def test_a_request_that_was_not_admitted_or_comes_twice_is_our_own_fault():
    contest = race()
    feed(contest, 200, 210, request=3)

    for group in (b"3", b"4"):
        with pytest.raises(AssertionError):
            contest.observe(9, 200, 100, 210, 100, group, now_s=0.0)


def test_a_decided_race_takes_no_more():
    contest = race()
    run(contest, [0.5] * 100)

    with pytest.raises(AssertionError):
        feed(contest, 200, 210, request=500)


def test_a_race_can_be_withdrawn_before_its_first_request():
    contest = race()

    verdict = contest.withdraw("an operator rolled the incumbent back", now_s=FROZEN_S + 5)

    assert verdict == contest.verdict
    assert (verdict.decision, verdict.num_requests, verdict.e_value) == ("drop", 0, 1.0)
    assert verdict.accept_length_candidate == 0.0
    with pytest.raises(AssertionError):
        feed(contest, 200, 210)


def test_a_race_is_stalled_when_its_last_requests_promise_no_promotion_in_time():
    contest = race(stall_requests=8, max_requests=60)
    run(contest, [0.3] * 8)

    assert not contest.is_stalled

    for request in range(8, 16):
        feed(contest, 200, 203, request=request)

    assert contest.is_stalled
    assert contest.verdict is None


def test_a_race_younger_than_the_window_is_not_stalled():
    contest = race(stall_requests=8)
    run(contest, [0.0] * 7)

    assert not contest.is_stalled


def test_a_verdict_survives_json():
    contest = race()
    contest.admits(FROZEN_S, b"g", (1,))
    verdict = run(contest, [1.0] * 400)

    stored = msgspec.json.decode(msgspec.json.encode(verdict))

    assert msgspec.convert(stored, Verdict) == verdict
    assert stored["num_dropped_early"] == 1


def test_rolled_back_weights_are_refused_with_a_reason():
    assert "abc" in barred_reason("abc", {"abc"})
    assert barred_reason("abc", {"abd"}) is None


def test_races_between_equal_drafts_seldom_promote():
    random = np.random.default_rng(6)
    num_races, alpha = 600, 0.05
    verdicts = [run(race(alpha=alpha), random.normal(0.0, 0.22, 400).clip(-1, 1).tolist()) for _ in range(num_races)]

    num_false = sum(verdict.decision == "promote" for verdict in verdicts)

    assert num_false <= num_races * alpha + 3 * (num_races * alpha * (1 - alpha)) ** 0.5


def test_long_conversations_that_share_their_luck_seldom_promote():
    random = np.random.default_rng(11)
    num_races, alpha, num_turns, num_false = 300, 0.05, 10, 0
    for _ in range(num_races):
        contest = race(alpha=alpha, min_gain_tokens=0.0, futility_requests=400)
        for conversation in range(40):
            luck = random.normal(0.0, 0.2)
            for turn in range(num_turns):
                if contest.verdict is None and contest.admits(FROZEN_S + 1, b"%d" % conversation, (turn,)):
                    gain = round((luck + random.normal(0.0, 0.1)) * NUM_STEPS)
                    contest.observe(turn, 200, NUM_STEPS, 200 + gain, NUM_STEPS, b"%d" % conversation, now_s=0.0)
        num_false += contest.verdict is not None and contest.verdict.decision == "promote"

    assert num_false <= num_races * alpha + 3 * (num_races * alpha * (1 - alpha)) ** 0.5
