"""The fold of what operators order: small tables of events and the state they leave."""

import pytest

from onlinespec.errors import VersionError
from onlinespec.versions.journal import (
    AnyEvent,
    CanaryEnded,
    DepthChanged,
    GuardTripped,
    Judged,
    Paused,
    Pinned,
    Promoted,
    Published,
    RaceStarted,
    Resumed,
    RolledBack,
    ServerStarted,
    TargetChanged,
    Unpinned,
    Withheld,
)
from onlinespec.versions.state import check_pin, rollback_from, state_of


def published(version: int, parent: int | None = None) -> Published:
    return Published(time_s=1.0, version=version, digest=f"d{version}", parent=parent)


def promoted(version: int, from_version: int, by: str = "gate") -> Promoted:
    return Promoted(time_s=2.0, version=version, from_version=from_version, by=by)


def rolled_back(from_version: int, to_version: int, by: str = "operator") -> RolledBack:
    return RolledBack(
        time_s=3.0, from_version=from_version, to_version=to_version, by=by, barred_digest=f"d{from_version}"
    )


STARTED = ServerStarted(time_s=1.5, version=1)
LIFE: list[AnyEvent] = [published(1), STARTED, published(2, 1), promoted(2, 1), published(3, 2), promoted(3, 2)]
PIN, UNPIN = Pinned(time_s=3.0, version=3), Unpinned(time_s=3.0, version=3)
PAUSE, RESUME = Paused(time_s=3.0), Resumed(time_s=3.0)


@pytest.mark.parametrize(
    ("orders", "pinned", "is_paused", "hold"),
    [
        ([], None, False, None),
        ([PIN], 3, False, "version 3 is pinned"),
        ([PAUSE], None, True, "the gate is paused"),
        ([PAUSE, PIN], 3, True, "version 3 is pinned"),
        ([PIN, PAUSE, UNPIN], None, True, "the gate is paused"),
        ([PAUSE, RESUME], None, False, None),
        ([PAUSE, PIN, ServerStarted(time_s=9.0, version=3)], 3, True, "version 3 is pinned"),
    ],
)
def test_pin_and_pause_hold_until_taken_back_and_over_restarts(orders, pinned, is_paused, hold):
    state = state_of([*LIFE, *orders])

    assert (state.pinned, state.is_paused, state.hold) == (pinned, is_paused, hold)
    assert (state.incumbent, state.previous) == (3, 2)


@pytest.mark.parametrize(
    ("events", "incumbent", "previous", "barred"),
    [
        ([promoted(1, 3, "operator")], 1, 3, set()),
        ([rolled_back(3, 2), promoted(3, 2, "operator")], 3, 2, set()),
        ([rolled_back(3, 2), promoted(1, 2, "operator")], 1, 2, {"d3"}),
        ([rolled_back(3, 2, "guard"), promoted(3, 2, "gate")], 3, 2, {"d3"}),
        ([promoted(1, 3, "operator"), rolled_back(1, 3)], 3, 2, {"d1"}),
        ([Withheld(time_s=3.0, candidate_digest="x", reason="pinned")], 3, 2, set()),
    ],
)
def test_an_operators_promotion_serves_unbars_and_can_be_rolled_back(events, incumbent, previous, barred):
    state = state_of([*LIFE, *events])

    assert (state.incumbent, state.previous, state.barred) == (incumbent, previous, barred)


def test_promotions_by_the_gate_are_listed_once_and_an_operators_are_not():
    events = [*LIFE, published(4, 3), promoted(4, 3, "operator"), rolled_back(4, 2), promoted(3, 2)]

    assert state_of(events).promoted == (2, 3)


@pytest.mark.parametrize(
    ("events", "protected"),
    [
        ([], {2, 3}),
        ([rolled_back(3, 2)], {1, 2}),
        ([promoted(1, 3, "operator")], {1, 3}),
        ([published(4, 1), promoted(4, 3, "operator")], {1, 3, 4}),
        ([rolled_back(3, 1), PIN], {1, 3}),
    ],
)
def test_the_incumbent_its_parent_what_a_rollback_returns_to_and_the_pin_are_protected(events, protected):
    assert state_of([*LIFE, *events]).protected == protected


@pytest.mark.parametrize(
    ("events", "ancestors"),
    [
        ([], (2, 1)),
        ([rolled_back(3, 2), promoted(3, 2, "gate")], (2, 1)),
        ([rolled_back(2, 1), promoted(3, 1, "operator")], (1,)),
        ([promoted(1, 3, "operator")], ()),
        ([published(4, 2), promoted(4, 3, "operator")], (2, 1)),
    ],
)
def test_the_ancestors_are_what_the_incumbent_was_trained_from_but_for_the_barred(events, ancestors):
    assert state_of([*LIFE, *events]).ancestors == ancestors


def test_a_server_that_started_on_an_ancestor_leaves_the_damaged_version_out_of_what_a_rollback_returns_to():
    fallen = RolledBack(time_s=3.0, from_version=4, to_version=3, by="serve", barred_digest=None, reason="damaged")
    events = [
        *LIFE,
        published(4, 3),
        promoted(4, 1, "operator"),
        promoted(1, 4, "operator"),
        promoted(4, 1, "operator"),
    ]

    state = state_of([*events, fallen])

    assert (state.incumbent, state.previous, state.barred) == (3, 2, frozenset())


def test_a_run_that_served_nothing_protects_nothing():
    assert state_of([published(1)]).protected == frozenset()


def test_a_journal_without_parents_takes_them_from_the_gates_promotions():
    events = [published(1), STARTED, published(2), promoted(2, 1), published(3), promoted(3, 2, "operator")]

    assert state_of(events).parents == {2: 1}


@pytest.mark.parametrize(("to_version", "is_refused"), [(3, False), (2, True), (None, True)])
def test_a_pin_lets_nothing_else_into_service(to_version, is_refused):
    assert check_pin(state_of(LIFE), to_version) is None
    state = state_of([*LIFE, PIN])

    if is_refused:
        with pytest.raises(VersionError, match=r"version 3 is pinned .* run `onlinespec unpin` first"):
            check_pin(state, to_version)
    else:
        assert check_pin(state, to_version) is None


CHANGED = TargetChanged(time_s=5.0, from_digest="a", to_digest="b")
RACE = RaceStarted(time_s=4.0, candidate_digest="x", alpha=0.01)
JUDGED = Judged(time_s=6.0, candidate_digest="x", verdict={})


@pytest.mark.parametrize(
    ("events", "incumbent", "previous", "num_promotions", "num_candidates"),
    [
        ([RACE], 3, 2, 2, 1),
        ([RACE, CHANGED], 3, None, 0, 0),
        ([RACE, CHANGED, JUDGED], 3, None, 0, 1),
        ([CHANGED, RACE, promoted(4, 3)], 4, 3, 1, 1),
        ([CHANGED, promoted(4, 3), rolled_back(4, 3)], 3, None, 1, 0),
    ],
)
def test_a_changed_target_keeps_the_incumbent_and_voids_what_was_before(
    events, incumbent, previous, num_promotions, num_candidates
):
    state = state_of([*LIFE, *events])

    assert (state.incumbent, state.previous) == (incumbent, previous)
    assert (state.num_promotions, state.num_candidates) == (num_promotions, num_candidates)


def test_a_changed_target_is_known_and_keeps_the_orders_the_bars_and_the_digests():
    events = [*LIFE, rolled_back(3, 2), Pinned(time_s=4.0, version=2), PAUSE, CHANGED]

    before, state = state_of(events[:-1]), state_of(events)

    assert (before.target_digest, state.target_digest) == (None, "b")
    assert (state.pinned, state.is_paused, state.barred) == (2, True, {"d3"})
    assert (state.digests, state.parents) == (before.digests, before.parents)


def test_a_target_that_changed_before_any_server_came_up_leaves_nothing_in_service():
    assert state_of([published(1), CHANGED]).incumbent is None


def test_the_event_of_a_rollback_carries_the_reason():
    assert rollback_from(state_of(LIFE), None, "operator", 9.0, "slow").reason == "slow"


def depth(num_steps: int) -> DepthChanged:
    return DepthChanged(time_s=4.0, num_steps=num_steps, by="floor")


@pytest.mark.parametrize(
    ("events", "num_steps"),
    [
        ([], None),
        ([depth(0)], 0),
        ([depth(0), depth(3)], 3),
        ([depth(0), promoted(2, 3, "operator")], 0),
        ([depth(0), ServerStarted(time_s=5.0, version=3)], None),
    ],
)
def test_a_depth_holds_for_the_life_of_the_server(events, num_steps):
    assert state_of([*LIFE, *events]).num_steps == num_steps


def test_a_canary_and_a_guard_that_tripped_change_nothing_until_a_swap_is_written_down():
    canary = CanaryEnded(time_s=4.0, version=4, decision="harm", evidence={})
    guard = GuardTripped(time_s=4.0, version=3, detector="quality", evidence={})

    assert state_of([*LIFE, canary, guard]) == state_of(LIFE)
    after = state_of([*LIFE, guard, rolled_back(3, 2, "guard")])
    assert (after.incumbent, after.barred) == (2, {"d3"})
