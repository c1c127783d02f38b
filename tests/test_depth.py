"""What the server is told of its draft depth, from the costs it reports."""

from pathlib import Path

import pytest

from onlinespec.config import FloorConfig
from onlinespec.depth import DepthKeeper
from onlinespec.gate.floor import load_bucket
from onlinespec.paths import RunPaths
from onlinespec.plugin.meter import Meter
from onlinespec.versions.journal import DepthChanged, Journal
from onlinespec.wire.messages import Hello, SetDepth
from onlinespec.wire.sockets import ControlClient
from tests.fake_server import FakeServer, lay_out

FLOOR = FloorConfig(enabled=True, min_accept_steps=10, min_dwell_s=1.0, probe_every_s=5.0)


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return lay_out(tmp_path / "run")


@pytest.fixture
def server(paths: RunPaths) -> FakeServer:
    return FakeServer(paths, 3)


def build_keeper(paths: RunPaths, depth: int = 3, starts_at_zero: bool = False) -> DepthKeeper:
    hello = Hello("0", [], 29, 16, 3, 3, True, True, "", 3, [], depth=depth, depths=[0, 3])
    control = ControlClient(paths.control_endpoint)
    return DepthKeeper(FLOOR, hello, control, Journal(paths), starts_at_zero=starts_at_zero)


def build_probing(paths: RunPaths, num_accepted: int, wall_us: int) -> DepthKeeper:
    """Of ten verify steps so many tokens, of 40 steps at depth 3 so much time; depth 0 is being probed."""
    keeper = build_keeper(paths)
    keeper.accepted(num_accepted, 10)
    keeper.costs(counted(0, 0, 0, 0, load=4), now_s=10.0)
    keeper.costs({"decode_steps_d3_b4": 40, "decode_us_d3_b4": wall_us}, now_s=11.0)
    keeper.keep(3, 12.0)
    return keeper


def counted(steps_0: int, us_0: int, steps_3: int, us_3: int, load: int) -> dict[str, int]:
    return {
        f"decode_steps_d0_b{load}": steps_0,
        f"decode_us_d0_b{load}": us_0,
        f"decode_steps_d3_b{load}": steps_3,
        f"decode_us_d3_b{load}": us_3,
    }


def metered_load(num_requests: int) -> int:
    return Meter({}, print, is_overlapped=False).begin(3, num_requests, None).load


@pytest.mark.parametrize("running", range(1, 34))
def test_a_cost_is_found_under_the_load_that_it_was_measured_at(running: int):
    assert load_bucket(metered_load(running)) == load_bucket(running)


def test_a_draft_that_does_not_pay_is_switched_off_once_and_it_is_written_down(paths, server):
    keeper = build_keeper(paths)

    keeper.accepted(14, 10)
    keeper.costs(counted(0, 0, 0, 0, load=4), now_s=10.0)
    keeper.costs(counted(40, 400_000, 40, 1_000_000, load=4), now_s=11.0)
    for now_s in (12.0, 13.0):
        keeper.keep(3, now_s)

    assert server.orders == [SetDepth(0)]
    (event,) = [event for event in Journal(paths).read() if isinstance(event, DepthChanged)]
    assert (event.num_steps, event.by) == (0, "floor")
    assert event.reason == "depth 0: speculation does not pay, accept length 1.40 against a break-even of 2.50"


def test_what_was_accepted_before_a_drift_does_not_keep_the_draft_running(paths, server):
    keeper = build_keeper(paths)
    keeper.accepted(3_000, 1_000)
    keeper.costs(counted(0, 0, 0, 0, load=4), now_s=10.0)
    keeper.costs(counted(40, 400_000, 40, 1_000_000, load=4), now_s=11.0)
    keeper.keep(4, 12.0)

    keeper.forget_accept()
    keeper.accepted(14, 10)
    keeper.keep(4, 13.0)

    assert server.orders == [SetDepth(0)]


def test_a_fresh_draft_starts_at_depth_zero_before_any_request(paths, server):
    keeper = build_keeper(paths, starts_at_zero=True)

    keeper.keep(0, 1.0)

    assert server.orders == [SetDepth(0)]
    assert keeper.num_steps == 0


def test_beside_a_server_at_depth_zero_a_restart_changes_nothing(paths, server):
    keeper = build_keeper(paths, depth=0)

    keeper.keep(3, 1.0)

    assert not server.orders


def test_the_first_costs_of_a_depth_that_was_never_run_before_count_in_full(paths, server):
    keeper = build_keeper(paths)

    keeper.accepted(14, 10)
    keeper.costs({"decode_steps_d3_b4": 500, "decode_us_d3_b4": 1}, now_s=10.0)
    keeper.costs(counted(40, 400_000, 540, 1_000_001, load=4), now_s=11.0)
    keeper.keep(3, 12.0)

    assert [event.num_steps for event in Journal(paths).read() if isinstance(event, DepthChanged)] == [0], "no probe"


def test_a_probe_is_for_some_steps_asked_for_again_where_too_few_were_timed_and_then_over(paths, server):
    keeper = build_probing(paths, 30, 600_000)
    depths = [keeper.num_steps]
    keeper.costs(counted(12, 120_000, 40, 600_000, load=4), now_s=13.0)
    keeper.keep(3, 13.0)
    keeper.costs(counted(16, 160_000, 60, 900_000, load=4), now_s=14.0)
    keeper.keep(3, 14.0)
    keeper.keep(3, 15.0)
    depths.append(keeper.num_steps)

    assert server.orders == [SetDepth(0, 16 + 8), SetDepth(0, 4 + 8), SetDepth(3)]
    assert depths == [3, 3]
    assert not [event for event in Journal(paths).read() if isinstance(event, DepthChanged)]


def test_a_probe_that_shows_the_other_depth_faster_is_followed_by_a_change_that_lasts(paths, server):
    keeper = build_probing(paths, 14, 1_000_000)
    keeper.costs(counted(24, 240_000, 40, 1_000_000, load=4), now_s=13.0)
    keeper.keep(3, 13.0)

    assert server.orders == [SetDepth(0, 16 + 8), SetDepth(0)]
    assert keeper.num_steps == 0
    assert [event.num_steps for event in Journal(paths).read() if isinstance(event, DepthChanged)] == [0]


def test_a_trial_ends_a_probe(paths, server):
    keeper = build_probing(paths, 30, 600_000)

    depths = [keeper.settle(), keeper.settle()]

    assert depths == [3, 3]
    assert server.orders == [SetDepth(0, 16 + 8), SetDepth(3)]
