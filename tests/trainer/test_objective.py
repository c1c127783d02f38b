"""What a step adds up, and how one objective gives way to another."""

from dataclasses import astuple

import pytest

from onlinespec.config import TrainerConfig
from onlinespec.trainer.objective import Mix, Objective


def test_the_accept_term_rises_from_nothing_and_the_shares_sum_to_one():
    objective = Objective(TrainerConfig(accept_frac=0.4, accept_ramp_steps=10))

    mixes = [objective.at(step) for step in (0, 5, 10, 50)]

    assert [mix.accept for mix in mixes] == pytest.approx([0.0, 0.2, 0.4, 0.4])
    assert [mix.kl + mix.reverse_kl + mix.accept for mix in mixes] == pytest.approx([1.0] * 4)


def test_accept_alone_begins_as_kl():
    objective = Objective(TrainerConfig(accept_frac=1.0, accept_ramp_steps=10))

    assert astuple(objective.at(0)) == (1.0, 0.0, 0.0, 0.0)
    assert astuple(objective.at(10)) == (0.0, 0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("loss", "expected"), [("kl", (1, 0, 0, 0)), ("reverse_kl", (0, 1, 0, 0)), ("hard", (1, 0, 0, 1))]
)
def test_a_loss_is_whole_from_the_first_step(loss, expected):
    assert astuple(Objective(TrainerConfig(loss=loss)).at(0)) == expected


def test_a_changed_loss_rises_from_the_mix_that_was_in_force():
    first = Objective(TrainerConfig(loss="hard", accept_ramp_steps=10))

    second = Objective(TrainerConfig(loss="reverse_kl", accept_ramp_steps=10))
    second.load_state(first.state(), step=100)
    third = Objective(TrainerConfig(loss="kl", accept_ramp_steps=10))
    third.load_state(second.state(), step=105)

    assert second.at(100) == Mix(1.0, 0.0, 0.0, 1.0)
    assert second.at(105) == Mix(0.5, 0.5, 0.0, 0.5)
    assert second.at(110) == Mix(0.0, 1.0, 0.0, 0.0)
    assert third.at(105) == second.at(105)
    assert third.at(115) == Mix(1.0, 0.0, 0.0, 0.0)


def test_the_same_objective_goes_on_where_it_stood():
    config = TrainerConfig(accept_frac=0.4, accept_ramp_steps=10)
    first, second = Objective(config), Objective(config)

    second.load_state(first.state(), step=5)

    assert [second.at(step) for step in range(20)] == [first.at(step) for step in range(20)]
