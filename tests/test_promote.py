"""From a won race to what is in service: the trial, the guard, another hand, another target."""

import os
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from onlinespec.config import CanaryConfig, Config, GateConfig
from onlinespec.draft.sample import VerifySteps
from onlinespec.draft.walk import accept_walk
from onlinespec.gate.guard import GuardVerdict
from onlinespec.gate.lag import NUM_REQUESTS
from onlinespec.gate.race import Race
from onlinespec.gate.verdict import Walked
from onlinespec.launch import Launch
from onlinespec.paths import RunPaths
from onlinespec.promote import Promoter
from onlinespec.versions.journal import (
    AnyEvent,
    CanaryEnded,
    GuardTripped,
    Journal,
    Pinned,
    PrefixesRenewed,
    RolledBack,
    SwapFailed,
    TargetChanged,
    Unpinned,
)
from onlinespec.versions.state import state_of
from onlinespec.watch import walked
from onlinespec.wire.messages import BlockEnded, GetHello, Hello, StartSwitchback, StopSwitchback
from onlinespec.wire.sockets import ControlClient
from tests.draft.tiny import build_draft, build_sample
from tests.fake_server import PROVENANCE, TARGET, FakeServer, lay_out

NUM_STEPS = 3


def test_a_walk_is_counted_by_draft_position_up_to_the_last_token():
    matches_RK = torch.rand((40, NUM_STEPS), generator=torch.Generator().manual_seed(0)) < 0.7
    start, end = 10, 49

    steps = accept_walk(matches_RK, start, end, NUM_STEPS)
    found = walked(steps, end, NUM_STEPS)

    reached, matched, num_tokens, position = [0] * NUM_STEPS, [0] * NUM_STEPS, 0, start
    for step in range(len(steps)):
        assert steps.start[step] == position
        for k in range(NUM_STEPS):
            # The drafted token stands at position + k + 1; past the end nobody knows what it should have been.
            if position + k + 1 > end:
                break
            reached[k] += 1
            if not matches_RK[position - start, k]:
                break
            matched[k] += 1
        num_tokens += steps.num_committed[step]
        position += steps.num_committed[step]
    assert found == Walked(num_tokens, len(steps), tuple(reached), tuple(matched))
    assert reached[0] > reached[1] > reached[2] > 0


def test_a_walk_without_a_step_counts_nothing():
    steps = accept_walk(torch.zeros((0, NUM_STEPS), dtype=torch.bool), 5, 5, NUM_STEPS)

    assert walked(steps, 5, NUM_STEPS) == Walked(0, 0, (0, 0, 0), (0, 0, 0))


TRIAL = Config(canary=CanaryConfig(min_pairs=2, block_steps=4))


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """The third version is in service, after the first and the second."""
    return lay_out(tmp_path / "run")


@pytest.fixture
def server(paths: RunPaths) -> FakeServer:
    return FakeServer(paths, 3)


def build_promoter(paths: RunPaths, config: Config = TRIAL) -> Promoter:
    launch = Launch("m", "d", 1, TARGET, "127.0.0.1", 1, 3, 128, os.getpid())
    control = ControlClient(paths.control_endpoint)
    hello = control.request(GetHello())
    assert isinstance(hello, Hello)
    return Promoter(paths, config, launch, control, hello, torch.zeros(29, 16), lambda _: False)


def win(promoter: Promoter) -> None:
    """A race, won."""
    promoter.freeze(build_draft(seed=9).weights(), PROVENANCE)
    assert promoter.race is not None
    promoter._conclude(msgspec.structs.replace(promoter.race.withdraw("better", now_s=2.0), decision="promote"))


def play(promoter: Promoter, gain: float, num_pairs: int = 400) -> int:
    """Pairs of blocks until the trial ends; the candidate commits `gain` tokens a verify step more."""
    for pair in range(num_pairs):
        if promoter.trial is None:
            return pair
        order = promoter.trial._order
        for index, version in enumerate((3, order.version)):
            tokens = round(100 * (2.0 + gain * (version == order.version)))
            promoter.block(
                BlockEnded(order.version, order.seed, pair, index, version, 3, 25, tokens, 100, 24, tokens, 24_000)
            )
    return num_pairs


def written(paths: RunPaths, *kinds: type) -> list[AnyEvent]:
    return [event for event in Journal(paths).read() if isinstance(event, kinds)]


def test_a_won_race_is_tried_in_live_traffic_and_promoted_once_it_is_shown_harmless(paths, server):
    promoter = build_promoter(paths)

    win(promoter)
    started = [order for order in server.orders if isinstance(order, StartSwitchback)]
    assert [order.version for order in started] == [4]
    assert server.swaps == []
    assert promoter.is_busy
    num_pairs = play(promoter, gain=0.5)

    assert 2 <= num_pairs < 400
    assert [swap.version for swap in server.swaps] == [4]
    assert isinstance(server.orders[-1], StopSwitchback)
    (ended,) = written(paths, CanaryEnded)
    assert (ended.version, ended.decision) == (4, "pass")
    assert state_of(Journal(paths).read()).incumbent == 4
    assert promoter.watch is not None
    assert (promoter.watch.guard.version, promoter.watch.guard.parent_version) == (4, 3)
    assert not promoter.has_moved


def stalled(promoter: Promoter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A race under way that cannot be won in time."""
    promoter.freeze(build_draft(seed=9).weights(), PROVENANCE)
    monkeypatch.setattr(Race, "is_stalled", lambda race, within: True)


def test_a_stalled_race_makes_room_for_a_newer_candidate_and_the_next_may_take_longer(paths, server, monkeypatch):
    promoter = build_promoter(paths)
    stalled(promoter, monkeypatch)
    before = promoter.patience.requests

    promoter.give_way(time.time())

    assert not promoter.is_busy
    assert promoter.cut_short is promoter.last_verdict
    assert promoter.patience.requests == 2 * before
    promoter.drifted(time.time())
    assert promoter.patience.requests == before


@pytest.mark.parametrize("num_requests", [11, 12])
def test_drift_ends_a_race_that_rests_on_requests_from_before_and_not_one_that_just_began(
    paths, server, monkeypatch, num_requests
):
    promoter = build_promoter(paths)
    promoter.freeze(build_draft(seed=9).weights(), PROVENANCE)
    assert promoter.race is not None
    promoter.race.num_requests = num_requests

    promoter.drifted(time.time())

    assert promoter.is_busy == (num_requests == 11)


def test_a_stalled_race_goes_on_where_no_other_may_begin(paths, server, monkeypatch):
    promoter = build_promoter(paths, msgspec.structs.replace(TRIAL, gate=GateConfig(max_candidates_per_hour=1)))
    stalled(promoter, monkeypatch)

    promoter.give_way(time.time())

    assert promoter.race is not None
    assert promoter.race.verdict is None


def test_a_candidate_that_hurts_in_live_traffic_is_not_promoted(paths, server):
    promoter = build_promoter(paths)
    win(promoter)

    play(promoter, gain=-0.5)

    (ended,) = written(paths, CanaryEnded)
    assert (ended.version, ended.decision) == (4, "harm")
    assert server.swaps == []
    assert isinstance(server.orders[-1], StopSwitchback)
    assert not promoter.is_busy


def test_blocks_of_another_switchback_say_nothing(paths, server):
    promoter = build_promoter(paths)
    win(promoter)
    assert promoter.trial is not None

    for candidate, seed in ((5, promoter.trial._order.seed), (4, promoter.trial._order.seed + 1)):
        promoter.block(BlockEnded(candidate, seed, 0, 0, 3, 3, 25, 200, 100, 24, 200, 24_000))
        promoter.block(BlockEnded(candidate, seed, 0, 1, 4, 3, 25, 200, 100, 24, 200, 24_000))

    assert promoter.trial.canary.num_pairs == 0


def test_another_hand_during_a_trial_ends_it_without_a_promotion(paths, server):
    promoter = build_promoter(paths)
    win(promoter)

    Journal(paths).append(RolledBack(time_s=9.0, from_version=3, to_version=2, by="operator", barred_digest=None))
    play(promoter, gain=0.5)

    (ended,) = written(paths, CanaryEnded)
    assert ended.decision == "withdrawn"
    assert server.swaps == []
    assert promoter.has_moved


def test_a_server_that_refuses_the_trial_keeps_its_version_and_it_is_written_down(paths, server):
    promoter = build_promoter(paths)
    server.refusal = "no memory"

    win(promoter)

    (failed,) = written(paths, SwapFailed)
    assert (failed.version, failed.reason) == (4, "no memory")
    assert not promoter.is_busy


def test_without_a_canary_a_won_race_is_swapped_in_at_once(paths, server):
    promoter = build_promoter(paths, Config(canary=CanaryConfig(enabled=False)))

    win(promoter)

    assert [swap.version for swap in server.swaps] == [4]
    assert not any(isinstance(order, StartSwitchback) for order in server.orders)


def test_harm_rolls_back_bars_the_weights_and_trains_on_from_what_is_served(paths, server):
    promoter = build_promoter(paths)
    assert promoter.watch is not None

    harm = corrupt_until_harm(promoter)
    promoter._roll_back(harm)

    assert harm.detector == "clean"
    assert harm.num_requests <= 15
    assert [swap.version for swap in server.swaps] == [2]
    (tripped, back) = written(paths, GuardTripped, RolledBack)
    assert (tripped.version, back.from_version, back.to_version, back.by) == (3, 3, 2, "guard")
    assert back.barred_digest in state_of(Journal(paths).read()).barred
    assert promoter.has_moved
    assert promoter.service.version == 2


def test_a_lag_on_older_drafts_kv_renews_prefixes_once_and_rolls_nothing_back(paths, server):
    promoter = build_promoter(paths)
    assert promoter.watch is not None
    aged = promoter.watch.guard.detectors["aged"]

    for _ in range(2):
        for _ in range(NUM_REQUESTS):
            promoter.lag.observe(-0.5)
        promoter.observe(build_sample(1, 6, 8), None, is_judge=False)

    assert server.num_renewed == 1
    (renewed,) = written(paths, PrefixesRenewed)
    assert (renewed.version, renewed.lag_tokens) == (3, -0.5)
    assert promoter.watch.guard.detectors["aged"] is not aged
    assert server.swaps == []


def test_a_server_that_refuses_to_renew_prefixes_is_not_asked_again(paths, server, capsys):
    promoter = build_promoter(paths)
    assert promoter.watch is not None
    server.refusal, aged = "no", promoter.watch.guard.detectors["aged"]

    for _ in range(2):
        for _ in range(NUM_REQUESTS):
            promoter.lag.observe(-0.5)
        promoter.observe(build_sample(1, 6, 8), None, is_judge=False)

    assert capsys.readouterr().out.count("cached prefixes stay as they are: no") == 1
    assert written(paths, PrefixesRenewed) == []
    assert promoter.watch.guard.detectors["aged"] is aged, "what was seen still holds"
    assert promoter.lag.renewed_s < 0


def test_a_pin_outranks_the_guard_and_harm_is_written_down(paths, server, capsys):
    promoter = build_promoter(paths)
    Journal(paths).append(Pinned(time_s=9.0, version=3))

    promoter._roll_back(corrupt_until_harm(promoter))

    assert len(written(paths, GuardTripped)) == 1
    assert written(paths, RolledBack) == []
    assert server.swaps == []
    assert "version 3 is pinned" in capsys.readouterr().out
    assert promoter.watch is None

    Journal(paths).append(Unpinned(time_s=10.0, version=3))
    promoter.sync()

    assert promoter.watch is not None


def corrupt_until_harm(promoter: Promoter) -> GuardVerdict:
    """Requests whose every drafted token would match, and of which the live server accepted none."""
    assert promoter.watch is not None
    num_answer = 24
    for number in range(100):
        sample = build_sample(number, 6, num_answer)
        steps = num_answer - 1
        verify = VerifySteps(
            list(range(6, 6 + steps)), [3] * steps, [0] * steps, [1] * steps, [3] * steps, [False] * steps
        )
        sample = replace(sample, verify=verify, started_s=time.time() + 1, group=number.to_bytes(16, "little"))
        harm = promoter.watch.observe(sample, torch.ones(num_answer, 3, dtype=torch.bool), None, time.time())
        if harm is not None:
            return harm
    raise AssertionError("no harm was found in 100 requests")


def test_changed_target_weights_void_what_was_shown_and_what_could_be_returned_to(paths, server):
    promoter = build_promoter(paths)
    win(promoter)

    promoter.change_target(1)

    (ended, changed) = written(paths, CanaryEnded, TargetChanged)
    assert ended.decision == "withdrawn"
    assert (changed.from_digest, changed.to_digest) == (TARGET, f"{TARGET}+{os.getpid()}.1")
    assert promoter.watch is None
    assert promoter.service.state.previous is None
    assert promoter.service.num_target_updates() == 1


def test_a_server_that_serves_another_version_than_the_journal_says_is_right(paths, server):
    promoter = build_promoter(paths)
    server.version = 2

    promoter.service.reconcile()
    promoter.sync()

    assert promoter.service.version == 2
    assert promoter.has_moved
