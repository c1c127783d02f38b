"""A race between a candidate and the incumbent, request by request."""

import math

import msgspec
import numpy as np
import pytest

from onlinespec.config import GateConfig
from onlinespec.gate.race import Race, is_futile
from onlinespec.gate.verdict import Verdict, Walked, barred_reason, fidelity_of

FROZEN_S = 1000.0
NUM_STEPS = 100


LABELS = {"tenant": "a", "temperature": "greedy"}


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


def feed(contest, incumbent_tokens, candidate_tokens, request=0, slices=LABELS, fidelity="complete", started_s=None):
    """One conversation of 100 steps on either side, so that tokens are hundredths of accept length."""
    group, now_s = b"%d" % request, FROZEN_S + request
    started_s = FROZEN_S + 1.0 + request if started_s is None else started_s
    contest.admits(started_s, group, (request,))
    return contest.observe(
        request,
        Walked(incumbent_tokens, NUM_STEPS),
        Walked(candidate_tokens, NUM_STEPS),
        group,
        started_s=started_s,
        now_s=now_s,
        fidelity=fidelity,
        slices=slices,
    )


def run(contest, gains, slices=None, **options):
    """Feed gains in tokens per step until a verdict; None where none comes. slices: the tenant of each."""
    for request, gain in enumerate(gains):
        labels = LABELS if slices is None else {"tenant": slices[request]}
        verdict = feed(contest, 200, 200 + round(gain * NUM_STEPS), request, labels, **options)
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
    assert verdict.num_requests == 8
    assert verdict.span_s == 7.0
    assert verdict.frozen_at_s == FROZEN_S
    assert verdict.decided_at_s == FROZEN_S + 7


def test_a_promotion_waits_for_the_least_number_of_requests():
    assert run(race(min_requests=30), [1.0] * 100).num_requests == 30
    assert run(race(min_requests=1), [1.0] * 100).num_requests < 30


def test_evidence_that_was_lost_again_before_the_least_number_of_requests_does_not_promote():
    contest = race(min_requests=14, max_requests=14)

    verdict = run(contest, [3.0] * 6 + [-3.0] * 8)

    assert verdict.decision == "drop"


def test_a_promotion_waits_until_its_requests_began_far_enough_apart():
    contest = race(min_span_s=30.0)

    at_once = run(contest, [0.5] * 60, started_s=FROZEN_S + 1.0)
    late = feed(contest, 200, 250, request=60, started_s=FROZEN_S + 31.5)

    assert at_once is None
    assert contest.has_passed
    assert (late.decision, late.span_s) == ("promote", 30.5)


def test_a_candidate_shown_better_in_a_burst_alone_is_dropped_with_that_reason():
    verdict = run(race(max_requests=60), [0.5] * 60, started_s=FROZEN_S + 1.0)

    assert verdict.decision == "drop"
    assert "came within 0.0 s, wanted 5" in verdict.reason


def test_a_candidate_that_is_no_better_is_dropped_at_the_futility_look():
    verdict = run(race(futility_requests=24), [0.0] * 100)

    assert verdict.decision == "drop"
    assert verdict.num_requests == 24
    assert "not above 0.01" in verdict.reason


def test_a_candidate_that_may_still_be_better_outlives_the_futility_look():
    gains = [-0.2, 0.2] * 20
    contest = race(futility_requests=24)

    assert run(contest, gains) is None
    assert contest.mean_gain_tokens < 0.01


def test_futility_is_a_standard_error_below_what_is_wanted():
    config = GateConfig(futility_requests=3)
    gains_SN = np.random.default_rng(3).normal(0.0, 0.1, (200, 3))

    found_S = is_futile(3, gains_SN.sum(1), (gains_SN**2).sum(1), config)

    expected = [np.mean(gains) + np.std(gains) / 3**0.5 <= 0.01 for gains in gains_SN]
    assert found_S.tolist() == expected
    assert 0 < sum(expected) < 200
    assert not is_futile(2, -1.0, 0.5, config)


def test_an_undecided_candidate_is_dropped_at_the_last_request():
    verdict = run(race(max_requests=40, alpha=0.001), [0.05] * 100)

    assert verdict.decision == "drop"
    assert verdict.num_requests == 40


def test_the_gain_is_the_mean_over_requests_and_accept_length_is_weighted_by_steps():
    contest = race()
    contest.admits(FROZEN_S + 1, b"a", (1,))
    contest.admits(FROZEN_S + 1, b"b", (1,))

    rest = {"started_s": FROZEN_S + 1, "now_s": 0.0, "fidelity": "complete", "slices": {}}
    contest.observe(0, Walked(10, 10, (10, 0), (0, 0)), Walked(10, 5, (5, 4), (4, 1)), b"a", **rest)
    contest.observe(1, Walked(300, 100, (90, 80), (80, 70)), Walked(300, 300, (200, 1), (1, 0)), b"b", **rest)
    verdict = contest.withdraw("enough", now_s=0.0)

    assert verdict.mean_gain_tokens == pytest.approx(((2.0 - 1.0) + (1.0 - 3.0)) / 2)
    assert verdict.accept_length_incumbent == pytest.approx(310 / 110)
    assert verdict.accept_length_candidate == pytest.approx(310 / 305)
    assert verdict.incumbent == Walked(310, 110, (100, 80), (80, 70))
    assert verdict.candidate == Walked(310, 305, (205, 5), (5, 1))


def test_the_interval_is_the_normal_approximation_of_the_mean():
    gains = np.round(np.random.default_rng(5).normal(0.0, 0.3, 24), 2).tolist()
    contest = race(futility_requests=24, min_gain_tokens=2.0, gain_clip_tokens=2.5)

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

    rest = {"started_s": FROZEN_S + 1, "now_s": 0.0, "fidelity": "complete", "slices": LABELS}
    assert contest.observe(0, Walked(), Walked(), b"g", **rest) is None
    assert (contest.num_requests, contest.num_dropped_empty) == (0, 1)


def test_a_request_that_was_not_admitted_or_comes_twice_is_our_own_fault():
    contest = race()
    feed(contest, 200, 210, request=3)

    for group in (b"3", b"4"):
        with pytest.raises(AssertionError):
            contest.observe(
                9,
                Walked(200, 100),
                Walked(210, 100),
                group,
                started_s=FROZEN_S + 1,
                now_s=0.0,
                fidelity="complete",
                slices=LABELS,
            )


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
    contest = race(stall_requests=8)
    run(contest, [0.3] * 8)

    assert not contest.is_stalled(60)

    for request in range(8, 16):
        feed(contest, 200, 203, request=request)

    assert contest.is_stalled(60)
    assert contest.verdict is None


def test_a_slow_race_is_stalled_within_few_requests_and_not_within_many():
    contest = race(stall_requests=8)

    run(contest, [0.05] * 20)

    assert contest.is_stalled(40)
    assert not contest.is_stalled(1000)


def test_a_race_that_has_taken_as_many_requests_as_it_may_goes_on_only_where_a_window_would_win_it():
    far, near = race(stall_requests=8), race(stall_requests=8)

    run(far, [-0.1, 0.2] * 20)
    run(near, [0.16] * 19)

    assert far.verdict is None
    assert near.verdict is None
    assert far.is_stalled(40)
    assert not near.is_stalled(19)


def test_a_difference_counts_for_at_most_the_clip():
    clipped, same = race(gain_clip_tokens=0.5), race(gain_clip_tokens=0.5)

    run(clipped, [3.0, -3.0, 0.25])
    run(same, [0.5, -0.5, 0.25])

    assert clipped.e_value == pytest.approx(same.e_value)
    assert clipped.mean_gain_tokens == pytest.approx(0.25 / 3)


def test_a_race_that_waits_for_its_slices_alone_is_not_stalled():
    contest = race(stall_requests=8, min_requests=60)

    run(contest, [0.5] * 40 + [0.0] * 9)

    assert contest.has_passed
    assert not contest.is_stalled(40)


@pytest.mark.parametrize(("gain", "within", "most"), [(0.5, 64, 0), (0.1, 256, 2), (0.05, 1000, 5)])
def test_a_gain_with_the_usual_spread_is_seldom_stalled_at_any_look_where_there_is_time(gain, within, most):
    random = np.random.default_rng(8)
    num_stalled = 0
    for _ in range(40):
        contest = race()
        for request, found in enumerate(random.normal(gain, 0.22, 1000).clip(-1, 1)):
            is_over = feed(contest, 200, 200 + round(found * NUM_STEPS), request) is not None
            if is_over or contest.is_stalled(within):
                num_stalled += not is_over
                break

    assert num_stalled <= most


def test_a_race_younger_than_the_window_is_not_stalled():
    contest = race(stall_requests=8)
    run(contest, [0.0] * 7)

    assert not contest.is_stalled(1000)


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
    num_races, alpha = 200, 0.2
    verdicts = [run(race(alpha=alpha), random.normal(0.0, 0.22, 200).clip(-1, 1).tolist()) for _ in range(num_races)]

    num_false = sum(verdict is not None and verdict.decision == "promote" for verdict in verdicts)

    assert num_false <= num_races * alpha + 3 * (num_races * alpha * (1 - alpha)) ** 0.5


def test_long_conversations_that_share_their_luck_seldom_promote():
    random = np.random.default_rng(11)
    num_races, alpha, num_turns, num_false = 200, 0.05, 10, 0
    for _ in range(num_races):
        contest = race(alpha=alpha, min_gain_tokens=0.0, futility_requests=400)
        for conversation in range(40):
            luck = random.normal(0.0, 0.2)
            for turn in range(num_turns):
                gain = (luck + random.normal(0.0, 0.1)) * NUM_STEPS
                if contest.verdict is None and contest.admits(FROZEN_S + 1, b"%d" % conversation, (turn,)):
                    contest.observe(
                        turn,
                        Walked(200, NUM_STEPS),
                        Walked(200 + round(gain), NUM_STEPS),
                        b"%d" % conversation,
                        started_s=FROZEN_S + 1 + conversation,
                        now_s=0.0,
                        fidelity="complete",
                        slices={},
                    )
        num_false += contest.verdict is not None and contest.verdict.decision == "promote"

    assert num_false <= num_races * alpha + 3 * (num_races * alpha * (1 - alpha)) ** 0.5


def test_a_candidate_better_on_average_and_worse_on_a_large_slice_is_dropped():
    slices = ["b" if request % 3 == 2 else "a" for request in range(200)]
    gains = [-0.5 if label == "b" else 0.8 for label in slices]

    verdict = run(race(), gains, slices)

    assert verdict.decision == "drop"
    assert verdict.mean_gain_tokens > 0.2
    assert "tenant b (-0.50 tokens over" in verdict.reason
    assert verdict.reason.endswith("loses more than 0.2")


def test_a_candidate_whose_slice_is_not_shown_to_hold_waits_and_is_dropped_at_the_last_request():
    # A loss of exactly the tolerance is proven neither way.
    slices = ["b" if request % 3 == 2 else "a" for request in range(90)]
    gains = [-0.2 if label == "b" else 0.8 for label in slices]
    contest = race(max_requests=90)

    verdict = run(contest, gains, slices)

    assert contest.has_passed
    assert (verdict.decision, verdict.num_requests) == ("drop", 90)
    assert "leaves open whether tenant b" in verdict.reason


def test_the_empirical_bernstein_test_is_chosen_by_its_name():
    bold, careful = run(race(), [0.5] * 100), run(race(test="bernstein"), [0.5] * 100)

    assert (bold.test, careful.test) == ("betting", "bernstein")
    assert bold.num_requests < careful.num_requests


def test_each_request_is_of_one_class_of_fidelity():
    contest = race()

    for request, fidelity in enumerate(["complete", "completed", "missing_context", "swap_inside", "complete"]):
        feed(contest, 200, 210, request=request, fidelity=fidelity)
    verdict = contest.withdraw("enough", now_s=0.0)

    assert verdict.fidelity == {"complete": 2, "completed": 1, "missing_context": 1, "swap_inside": 1}


@pytest.mark.parametrize(
    ("has_swap", "is_complete", "num_completed_rows", "expected"),
    [
        (False, True, 0, "complete"),
        (False, True, 3, "completed"),
        (False, False, 3, "missing_context"),
        (True, False, 3, "swap_inside"),
        (True, True, 0, "swap_inside"),
    ],
)
def test_a_swap_inside_outranks_missing_rows_and_these_completed_ones(
    has_swap, is_complete, num_completed_rows, expected
):
    assert expected == fidelity_of(has_swap=has_swap, is_complete=is_complete, num_completed_rows=num_completed_rows)
