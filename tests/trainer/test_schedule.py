"""Learning rates over the steps."""

import math

import pytest

from onlinespec.config import TrainerConfig
from onlinespec.trainer.schedule import lr_factor


def factors(num_steps: int, **changes) -> list[float]:
    config = TrainerConfig(warmup_steps=4, schedule_steps=24, min_lr_frac=0.1, decay_frac=0.25, **changes)
    return [lr_factor(config, step) for step in range(1, num_steps + 1)]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_every_schedule_begins_with_a_linear_warm_up(schedule):
    assert factors(4, schedule=schedule) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_constant_stays():
    assert factors(100, schedule="constant")[4:] == [1.0] * 96


def test_cosine_falls_along_a_half_wave_to_its_floor_and_stays():
    found = factors(40, schedule="cosine")

    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * (step - 4) / 20)) / 2 for step in range(5, 25)]
    assert found[4:24] == pytest.approx(expected)
    assert found[24:] == pytest.approx([0.1] * 16)


def test_wsd_stays_and_then_falls_linearly_to_its_floor():
    found = factors(40, schedule="wsd")

    assert found[3:18] == [1.0] * 15
    assert found[18:24] == pytest.approx([1 - 0.15 * k for k in range(1, 7)])
    assert found[24:] == pytest.approx([0.1] * 16)
