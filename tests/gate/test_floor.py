"""When speculation pays, against a simulated server of known costs."""

from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest

from onlinespec.config import FloorConfig
from onlinespec.gate.floor import Floor, load_bucket

CONFIG = FloorConfig(
    min_cost_steps=8,
    cost_window_steps=128,
    min_accept_steps=200,
    accept_window_steps=1000,
    hysteresis_frac=0.1,
    min_dwell_s=30.0,
    max_dwell_s=480.0,
    probe_steps=16,
    probe_every_s=30.0,
    probe_frac=0.05,
)
DEPTH = 3
RETURN_S = 35.0
"""what the module promises here: probe_every_s, the probe, a look"""


@dataclass
class Server:
    """Runs the wanted depth and reports once a second. Break-even is 1.3 for one request."""

    floor: Floor
    accept: float = 2.2
    zero_s: float = 0.010
    full_s: float = 0.013
    running: int = 1
    noise: float = 0.0
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    now_s: float = 0.0
    probe_steps: int = 0
    steps: int = 0
    depths: list[int] = field(default_factory=list)
    """the floor's depth after each look, probes apart"""

    def run(self, seconds: int) -> "Server":
        for _ in range(seconds):
            self.now_s += 1.0
            wanted = self.floor.decide(self.running, self.now_s)
            left_s = 1.0
            if wanted.num_steps is not None:
                left_s -= self._steps(wanted.depth, wanted.num_steps, left_s)
            self._steps(self.floor.depth, 10**9, left_s)
            if self.running:
                self.floor.observe_accept(*self._walk())
            self.depths.append(self.floor.depth)
        return self

    def until(self, depth: int) -> float:
        """Seconds until the floor wants this depth."""
        started_s = self.now_s
        while self.floor.depth != depth:
            assert self.now_s - started_s < 3600.0
            self.run(1)
        return self.now_s - started_s

    def _steps(self, depth: int, most: int, left_s: float) -> float:
        step_s = (self.full_s if depth else self.zero_s) * max(1.0 + self.noise * self.rng.normal(), 0.2)
        num = min(most, max(int(left_s / step_s), 1)) if self.running and left_s > 0 else 0
        self.floor.observe_cost(depth, self.running, num, num * step_s, now_s=self.now_s)
        self.steps += num
        self.probe_steps += num * (depth != self.floor.depth)
        return num * step_s

    def _walk(self) -> tuple[int, int]:
        share = (self.accept - 1.0) / DEPTH
        return 100 + int(self.rng.binomial(100 * DEPTH, share)), 100


def a_server(config: FloorConfig = CONFIG, starts_at_zero: bool = False, **facts) -> Server:
    return Server(Floor(config, DEPTH, starts_at_zero=starts_at_zero), **facts)


def test_a_draft_that_pays_stays_and_its_break_even_is_measured():
    server = a_server().run(600)

    figures = server.floor.figures(1, server.now_s)
    assert set(server.depths) == {DEPTH}
    assert figures.break_even == pytest.approx(1.3)
    assert figures.accept_length == pytest.approx(2.2, abs=0.1)
    assert "pays" in server.floor.decide(1, server.now_s).reason


def test_a_draft_that_became_slow_is_switched_off_and_comes_back_when_it_is_quick_again():
    server = a_server().run(120)

    server.full_s = 0.050
    off_s = server.until(0)
    server.run(600)
    assert set(server.depths[-600:]) == {0}
    server.full_s = 0.013
    on_s = server.until(DEPTH)

    assert off_s <= 5.0
    assert on_s <= RETURN_S
    assert server.floor.num_changes == 2


def test_a_slow_probe_delays_the_next_so_that_probing_stays_within_its_share():
    server = a_server(zero_s=0.050, full_s=0.065).run(120)

    server.full_s = 1.0
    server.until(0)
    server.probe_steps = 0
    server.run(3600)

    assert 0 < server.probe_steps * 1.0 / 3600 <= 0.05 * 1.1


def test_what_probing_loses_is_small():
    server = a_server(accept=1.2)
    server.until(0)
    server.probe_steps = server.steps = 0

    server.run(3600)

    assert 0 < server.probe_steps / server.steps <= 16 / (30.0 / 0.013)


def test_a_fresh_draft_starts_at_depth_zero_and_speculates_once_it_passes_the_break_even():
    server = a_server(starts_at_zero=True, accept=1.02).run(300)
    assert server.floor.num_probes == 0

    for accept in (1.15, 1.25, 1.3):
        server.accept = accept
        server.run(120)
    assert set(server.depths) == {0}
    server.accept = 1.6
    server.until(DEPTH)

    assert server.floor.figures(1, server.now_s).accept_length > 1.3 * 1.1
    assert server.run(600).depths[-600:] == [DEPTH] * 600


def test_load_that_moves_the_break_even_moves_the_depth():
    server = a_server(accept=2.0).run(100)

    server.running, server.zero_s, server.full_s = 32, 0.020, 0.060
    server.until(0)
    server.run(200)
    assert set(server.depths[-200:]) == {0}
    server.running, server.zero_s, server.full_s = 1, 0.010, 0.013
    back_s = server.until(DEPTH)

    assert back_s <= RETURN_S


@pytest.mark.parametrize("noise", [0.05, 0.2])
@pytest.mark.parametrize("accept", [1.25, 1.3, 1.35, 2.2])
def test_noise_does_not_flip_the_depth_without_end(noise: float, accept: float):
    server = a_server(accept=accept, noise=noise).run(3600)

    changes = np.count_nonzero(np.diff(server.depths))
    assert changes <= 16
    assert changes == 0 or accept < 2.0


def test_changes_lie_a_dwell_time_apart_whatever_the_costs_do():
    """The worst there is: a draft that is slow while it runs and quick while it does not."""
    server = a_server()
    for _ in range(3600):
        server.full_s = 0.050 if server.floor.depth else 0.013
        server.run(1)

    apart = np.diff(np.flatnonzero(np.diff(server.depths)))
    assert (apart[:7] >= [30, 60, 120, 240, 480, 480, 480]).all()
    assert len(apart) >= 7


def test_a_machine_that_is_slow_for_all_is_not_blamed_on_the_draft():
    server = a_server(accept=1.6).run(120)

    server.zero_s, server.full_s = 0.100, 0.130
    server.run(120)

    assert set(server.depths) == {DEPTH}


def test_nothing_changes_before_accept_length_and_both_costs_are_known():
    floor = Floor(CONFIG, DEPTH)

    assert floor.decide(1, 0.0).reason.endswith("accept length is not known yet")
    floor.observe_accept(200, 200)
    floor.observe_cost(DEPTH, 1, 7, 0.7, now_s=1.0)
    assert floor.decide(1, 1.0).reason.endswith("not measured yet")
    floor.observe_cost(DEPTH, 1, 1, 0.1, now_s=2.0)
    probe = floor.decide(1, 2.0)
    assert (probe.depth, probe.num_steps) == (0, 16)
    floor.observe_cost(0, 1, 10, 0.1, now_s=3.0)
    assert floor.decide(1, 3.0).num_steps == 6
    floor.observe_cost(0, 1, 6, 0.06, now_s=4.0)
    wanted = floor.decide(1, 4.0)

    assert (wanted.depth, wanted.num_steps) == (0, None)
    assert "does not pay, accept length 1.00 against a break-even of 10.00" in wanted.reason


def test_a_server_that_does_not_follow_a_probe_is_asked_again_only_later():
    floor = Floor(CONFIG, DEPTH)
    floor.observe_accept(400, 200)
    wanted = []

    for second in range(100):
        floor.observe_cost(DEPTH, 1, 100, 1.3, now_s=float(second))
        wanted.append(floor.decide(1, float(second)).depth)

    assert floor.num_probes == 2
    assert wanted.count(0) == 31 + 31
    assert floor.depth == DEPTH


def test_an_idle_server_is_left_as_it_is():
    server = a_server(running=0).run(100)

    assert server.floor.num_probes == 0
    assert server.floor.decide(0, server.now_s).reason == "no request runs"


def test_a_swap_forgets_the_accept_length_and_keeps_the_costs():
    server = a_server().run(100)

    server.floor.forget_accept()

    figures = server.floor.figures(1, server.now_s)
    assert figures.accept_length is None
    assert figures.break_even is not None


def test_another_draft_is_news_that_waits_for_no_probe_and_no_change_before_it():
    server = a_server().run(100)
    server.accept = 1.0
    server.until(0)

    server.floor.forget_accept()
    server.accept = 2.2

    assert server.until(DEPTH) <= 6.0, "some looks and a probe; half a minute by the dwell time alone"


def test_a_cost_ages_out():
    floor = Floor(CONFIG, DEPTH)
    floor.observe_cost(0, 1, 100, 1.0, now_s=0.0)

    assert floor.figures(1, 300.0).zero_step_s == pytest.approx(0.01)
    assert floor.figures(1, 301.0).zero_step_s is None


def test_depths_and_steps_that_say_nothing_are_passed_over():
    floor = Floor(CONFIG, DEPTH)

    floor.observe_cost(2, 1, 100, 1.0, now_s=0.0)
    floor.observe_cost(0, 1, 0, 1.0, now_s=0.0)
    floor.observe_cost(DEPTH, 1, 100, 0.0, now_s=0.0)

    assert floor.figures(1, 0.0) == (Floor(CONFIG, DEPTH).figures(1, 0.0))


@pytest.mark.parametrize(("running", "bucket"), [(0, 0), (0.5, 0), (1, 0), (1.2, 1), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_loads_within_a_factor_of_two_share_a_cost(running: float, bucket: int):
    assert load_bucket(running) == bucket


def test_the_dwell_time_is_short_again_after_a_long_rest():
    server = a_server().run(120)
    for full_s, depth in ((0.050, 0), (0.013, DEPTH), (0.050, 0), (0.013, DEPTH)):
        server.full_s = full_s
        server.until(depth)
    server.run(1000)

    server.full_s = 0.050
    server.until(0)
    server.full_s = 0.013

    assert server.until(DEPTH) <= RETURN_S


def test_a_longest_dwell_below_the_shortest_is_refused():
    with pytest.raises(ValueError, match="max_dwell_s is 10"):
        msgspec.structs.replace(CONFIG, max_dwell_s=10.0)


def test_a_probe_too_short_to_measure_is_refused():
    with pytest.raises(ValueError, match="probe_steps is 4, wanted at least min_cost_steps, 8"):
        msgspec.structs.replace(CONFIG, probe_steps=4)
