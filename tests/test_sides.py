"""A conversation judges before it has trained, and never after."""

from dataclasses import replace

import pytest

from onlinespec import sides as module
from onlinespec.config import GateConfig
from onlinespec.draft.sample import Sample
from onlinespec.sides import Side, Sides
from tests.offline.small import build_samples

KEY = bytes(range(16))
TO_JUDGE_AND_TRAIN, TO_TRAIN, TO_JUDGE, FOR_NOTHING = (
    Side(True, True),
    Side(False, True),
    Side(True, False),
    Side(False, False),
)


def build_sides(holdout_frac: float = 1e-9, **config) -> Sides:
    return Sides(KEY, GateConfig(holdout_frac=holdout_frac, **config))


def sided(sides: Sides, sample: Sample, opening=(1, 2), is_first_turn: bool = True) -> tuple[Sample, Side]:
    return sides.side(sample, list(opening), is_first_turn)


def test_a_conversation_judges_until_it_has_trained():
    first, later = build_samples(2)
    sides = build_sides()

    sample, before = sided(sides, first)
    sides.train(sample)
    _, after = sided(sides, later)
    _, other = sided(sides, later, opening=(3, 4))

    assert (before, after, other) == (TO_JUDGE_AND_TRAIN, TO_TRAIN, TO_JUDGE_AND_TRAIN)


def test_one_tenant_s_conversation_is_not_another_s():
    sample = build_samples(1)[0]
    sides = build_sides()

    sides.train(sided(sides, sample)[0])
    _, side = sided(sides, replace(sample, tenant="another"))

    assert side == TO_JUDGE_AND_TRAIN


def test_a_share_never_trains_and_judges_at_every_request():
    sample = build_samples(1)[0]
    sides = build_sides(holdout_frac=0.25)

    found = [sided(sides, sample, opening=(i,))[1] for i in range(400)]

    assert 70 < found.count(TO_JUDGE) < 130
    assert found.count(TO_JUDGE) + found.count(TO_JUDGE_AND_TRAIN) == 400


def test_a_later_turn_of_a_conversation_that_nobody_knows_only_trains():
    sample = build_samples(1)[0]

    _, side = sided(build_sides(), sample, is_first_turn=False)
    _, held_out = sided(build_sides(holdout_frac=0.999999), sample, is_first_turn=False)

    assert (side, held_out) == (TO_TRAIN, TO_JUDGE)


def test_a_conversation_that_trained_before_it_was_held_out_is_for_nothing():
    sample = build_samples(1)[0]
    sides, raised = build_sides(), build_sides(holdout_frac=0.999999)
    sides.train(sided(sides, sample)[0])

    raised.load_state(sides.state())

    assert sided(raised, sample)[1] == FOR_NOTHING


def test_where_new_conversations_may_not_judge_only_the_share_does():
    sample = build_samples(1)[0]
    sides = build_sides(holdout_frac=0.25, judge_new=False)

    found = [sided(sides, sample, opening=(i,))[1] for i in range(400)]

    assert found.count(TO_JUDGE) + found.count(TO_TRAIN) == 400


def test_an_answer_that_was_trained_on_is_known_whatever_its_conversation():
    first, other = build_samples(2)
    sides = build_sides()

    sides.train(sided(sides, first)[0])

    assert sides.was_trained_on(first.answer_key)
    assert not sides.was_trained_on(other.answer_key)


def test_beyond_the_bound_the_oldest_is_forgotten_and_one_seen_again_is_new(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_SEEN", 2)
    sample = build_samples(1)[0]
    sides = build_sides()

    for turn in (1, 2, 1, 3):
        sides.train(sided(sides, sample, opening=(turn,))[0])

    found = [sided(sides, sample, opening=(turn,))[1] for turn in (1, 2, 3)]
    assert found == [TO_TRAIN, TO_JUDGE_AND_TRAIN, TO_TRAIN]


def test_it_goes_on_from_its_state():
    sample = build_samples(1)[0]
    sides, again = build_sides(), build_sides()
    sides.train(sided(sides, sample)[0])

    again.load_state(sides.state())

    assert sided(again, sample)[1] == TO_TRAIN
    assert again.was_trained_on(sample.answer_key)
