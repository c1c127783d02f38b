"""When a learner steps, and that it goes on where it stood."""

import math
from dataclasses import replace

import torch

from onlinespec.config import BufferConfig, Config, TrainerConfig
from onlinespec.draft.sample import VerifySteps
from onlinespec.trainer.learner import Learner
from tests.draft.tiny import CONFIG, build_draft, build_embedding, build_sample

TRAINER = TrainerConfig(batch_requests=2, passes=1, new_task_requests=0, unroll_steps=2, warmup_steps=0)


def build_learner(trainer: TrainerConfig = TRAINER, **buffer: float) -> Learner:
    config = Config(trainer=trainer, buffer=BufferConfig(recent_samples=4, reservoir_samples=6, **buffer))
    return Learner(config, CONFIG, build_draft().weights(), build_embedding())


def sample(number: int, accepted: int = 2):
    verify = VerifySteps([0], [3], [accepted], [accepted + 1], [1], [False])
    return replace(build_sample(number), verify=verify)


def steps(learner: Learner) -> int:
    """Steps taken until none is due."""
    number = 0
    while learner.step(0.0) is not None:
        number += 1
    return number


def test_so_many_new_requests_pay_for_a_step_and_no_more_than_32_are_owed():
    learner = build_learner()
    found = []
    for number in range(4):
        learner.add(sample(number), 0.0)
        found.append(steps(learner))
    for number in range(4, 100):
        learner.add(sample(number), 0.0)

    assert found == [0, 1, 0, 1]
    assert steps(learner) == 32


def test_each_request_is_drawn_as_often_as_asked_whatever_a_step_takes():
    learner = build_learner(
        TrainerConfig(batch_requests=2, accumulation=3, passes=6, new_task_requests=0, unroll_steps=2), replay_frac=0.0
    )
    found = 0
    for number in range(12):
        learner.add(sample(number), 0.0)
        found += steps(learner)

    assert found * 2 * 3 == 12 * 6


def test_the_first_requests_of_a_task_are_drawn_more_often_and_a_merged_one_is_not_new():
    trainer = TrainerConfig(batch_requests=1, passes=1, new_task_passes=3, new_task_requests=2, unroll_steps=2)
    learner = build_learner(trainer, num_clusters=1)
    found = []
    for number in range(5):
        learner.add(sample(number), 0.0)
        found.append(steps(learner))

    assert found == [3, 3, 1, 1, 1]


def test_nothing_is_due_without_rows_and_what_was_paid_is_kept():
    second = build_learner()

    second.load_state(paid_learner().state())
    assert not second.is_due
    second.add(sample(9), 0.0)

    assert steps(second) == 3


def test_a_round_begins_with_enough_new_failure_cases_and_spends_what_they_paid():
    learner = build_learner(accept_threshold=2.0, min_failure_cases=12)
    found = []
    for number in range(48):
        learner.add(sample(number, accepted=0 if number % 2 else 3), 0.0)
        found.append(steps(learner))

    assert [number for number, count in enumerate(found) if count] == [23, 47]
    assert [count for count in found if count] == [12, 12]


def test_with_the_trainer_off_nothing_is_due():
    learner = build_learner(TrainerConfig(enabled=False))
    for number in range(10):
        learner.add(sample(number), 0.0)

    assert not learner.is_due

    learner.load_state(paid_learner().state(), {number: sample(number) for number in range(6)})
    assert not learner.is_due


def paid_learner() -> Learner:
    """Three steps are due."""
    learner = build_learner()
    for number in range(6):
        learner.add(sample(number), 0.0)
    return learner


def play(learner: Learner, numbers) -> list[float]:
    losses = []
    for number in numbers:
        learner.add(sample(number), float(number))
        result = learner.step(float(number))
        losses.append(math.nan if result is None else result.loss)
    return losses


def test_a_killed_and_resumed_learner_gives_the_losses_of_an_unbroken_one(tmp_path):
    unbroken = play(build_learner(), range(24))
    first, second = build_learner(), build_learner()
    play(first, range(13))
    torch.save(first.state(), tmp_path / "state.pt")

    second.load_state(torch.load(tmp_path / "state.pt", weights_only=True), {n: sample(n) for n in range(13)})

    assert str(play(second, range(13, 24))) == str(unbroken[13:])
    assert sum(loss == loss for loss in unbroken) == 12
    assert second.num_tokens == 24 * 9


def test_without_rows_it_goes_on_from_its_weights_with_an_empty_buffer():
    first, second = build_learner(), build_learner()
    play(first, range(13))

    second.load_state(first.state())

    assert len(second.buffer) == 0
    assert second.trainer.num_steps == first.trainer.num_steps
    assert all(torch.equal(w, first.trainer.weights()[name]) for name, w in second.trainer.weights().items())
