"""When a step may start, and what calm lowers."""

import pytest

from onlinespec.config import PaceConfig
from onlinespec.trainer.pace import Pace


def simulate(pace: Pace, wall_s: float, step_s: float, running: int = 0) -> float:
    """Train whenever allowed, look every 10 ms otherwise; share of wall time spent in steps."""
    now_s = spent_s = 0.0
    while now_s < wall_s:
        if pace.may_step(now_s, is_due=True, running_requests=running):
            pace.stepped(step_s)
            spent_s += step_s
            now_s += step_s
        else:
            now_s += 0.01
    return spent_s / now_s


def calm(pace: Pace) -> Pace:
    for _ in range(3):
        pace.judged(is_promoted=False)
    return pace


@pytest.mark.parametrize("duty", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("step_s", [0.02, 0.5, 5.0])
def test_steps_take_their_share_of_wall_time_however_long_one_is(duty: float, step_s: float):
    pace = Pace(PaceConfig(duty_frac=duty), now_s=0.0)

    assert simulate(pace, 400.0, step_s) == pytest.approx(duty, rel=0.06, abs=0.005)


@pytest.mark.parametrize("before", [0, 50])
def test_a_compilation_inside_a_step_does_not_stop_training_for_its_time_over_the_duty(before: int):
    pace = Pace(PaceConfig(duty_frac=0.1), now_s=0.0)
    for number in range(before):
        assert pace.may_step(number, is_due=True, running_requests=0)
        pace.stepped(0.1)

    pace.stepped(40.0)

    waited_s = next(s for s in range(1000) if pace.may_step(before + s, is_due=True, running_requests=0))
    assert waited_s <= 51, "400 s by the duty"


def test_idle_time_is_not_saved_up_for_a_long_burst():
    pace = Pace(PaceConfig(duty_frac=0.5), now_s=0.0)
    pace.may_step(1000.0, is_due=False, running_requests=0)

    num_steps = 0
    while pace.may_step(1000.0, is_due=True, running_requests=0):
        pace.stepped(0.3)
        num_steps += 1

    assert num_steps == 4
    assert pace.state == "paused: duty"


def test_a_busy_server_pauses_training_and_a_quiet_one_lets_it_go_on():
    pace = Pace(PaceConfig(busy_requests=4), now_s=0.0)

    assert pace.may_step(1.0, is_due=True, running_requests=3)
    assert not pace.may_step(2.0, is_due=True, running_requests=4)
    assert pace.state == "paused: busy"
    assert pace.may_step(3.0, is_due=True, running_requests=0)
    assert pace.state == "training"


def test_no_number_of_requests_is_busy_where_none_is_set():
    assert simulate(Pace(PaceConfig(), now_s=0.0), 10.0, 0.1, running=1000) == pytest.approx(1.0)


def test_without_requests_to_train_on_it_waits():
    pace = Pace(PaceConfig(), now_s=0.0)

    assert not pace.may_step(1.0, is_due=False, running_requests=0)
    assert pace.state == "waiting for requests"


def test_calm_lowers_duty_and_capture_to_their_shares():
    pace = Pace(PaceConfig(duty_frac=0.8, calm_duty_frac=0.25, calm_capture_frac=0.1), now_s=0.0)
    before = (pace.is_calm, pace.duty_frac, pace.capture_frac)

    calm(pace)

    assert before == (False, 0.8, 1.0)
    assert (pace.is_calm, pace.capture_frac) == (True, 0.1)
    assert simulate(pace, 400.0, 0.1) == pytest.approx(0.2, rel=0.06)
    assert pace.state == "paused: calm"


def test_calm_may_stop_training_altogether():
    pace = calm(Pace(PaceConfig(calm_duty_frac=0.0), now_s=0.0))

    assert simulate(pace, 10.0, 0.1) == 0.0


def test_two_refusals_are_not_calm_and_a_promotion_starts_the_count_again():
    pace = Pace(PaceConfig(), now_s=0.0)
    found = []
    for is_promoted in [False, False, True, False, False, False, True]:
        pace.judged(is_promoted)
        found.append(pace.is_calm)

    assert found == [False, False, False, False, False, True, False]


def test_drift_ends_the_calm_at_once():
    pace = calm(Pace(PaceConfig(duty_frac=0.9, calm_duty_frac=0.1, calm_capture_frac=0.1), now_s=0.0))

    pace.drifted()

    assert (pace.is_calm, pace.duty_frac, pace.capture_frac) == (False, 0.9, 1.0)


def test_a_restart_remembers_the_calm():
    first, second = (Pace(PaceConfig(), now_s=0.0) for _ in range(2))

    second.load_saved(calm(first).saved())

    assert second.is_calm
