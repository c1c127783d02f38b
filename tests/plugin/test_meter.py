"""What is counted of decode steps, and what is dropped because something else ran in between."""

from collections import Counter
from types import SimpleNamespace

import pytest

from onlinespec.plugin.meter import Meter, Step, Turn
from onlinespec.plugin.switchback import Blocks
from onlinespec.wire.messages import BlockEnded, StartSwitchback

ORDER = StartSwitchback(9, "p", "d", 4, 1, 3)


class Bench:
    """A meter on a clock of its own: each step takes `step_us`, then its tokens are committed."""

    def __init__(self, is_overlapped: bool = False):
        self.counters: Counter[str] = Counter()
        self.said: list[BlockEnded] = []
        self.now_us = 0
        self.meter = Meter(self.counters, self.said.append, is_overlapped, lambda: 1000 * self.now_us)
        self._pending: list[tuple[Step, list]] = []
        self._is_overlapped = is_overlapped

    def decode(self, tokens: list[int], step_us: int, depth: int = 3, turn: Turn | None = None) -> None:
        self.meter.looked()
        step = self.meter.begin(depth, len(tokens), turn)
        self.now_us += step_us
        commits = [SimpleNamespace(token_ids=(0,) * n) if n else None for n in tokens]
        self._pending.append((step, commits))
        while len(self._pending) > self._is_overlapped:
            self.meter.committed(*self._pending.pop(0))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_steps_cost_is_the_time_to_the_next_one_with_its_own_tokens(bench: Bench):
    bench.decode([2, 1, 4], 700)
    bench.decode([1, 1, 1], 900)
    bench.decode([1, 1, 1], 500)

    assert bench.counters == {
        "decode_steps_d3_b4": 2,
        "decode_tokens_d3_b4": 10,
        "decode_requests_d3_b4": 6,
        "decode_us_d3_b4": 1600,
    }


@pytest.mark.parametrize("between", ["interrupt", "looked"])
def test_an_interval_with_something_else_in_it_is_dropped_and_the_next_one_counts(bench: Bench, between: str):
    bench.decode([1], 100)
    getattr(bench.meter, between)()
    bench.decode([1], 30)
    bench.decode([1], 100)

    assert bench.counters["decode_us_d3_b1"] == 30
    assert bench.counters["decode_steps_d3_b1"] == 1


def test_steps_of_other_depths_and_loads_are_kept_apart_and_the_change_is_dropped(bench: Bench):
    for depth, num_requests, step_us in [(3, 1, 10), (3, 1, 10), (0, 1, 4), (0, 1, 4), (0, 9, 5), (0, 15, 5)]:
        bench.decode([1] * num_requests, step_us, depth)

    assert {key: value for key, value in bench.counters.items() if key.startswith("decode_us")} == {
        "decode_us_d3_b1": 10,
        "decode_us_d0_b1": 4,
        "decode_us_d0_b16": 5,
    }


def test_a_request_that_committed_nothing_counts_neither_as_request_nor_as_token(bench: Bench):
    bench.decode([3, 0], 10)
    bench.decode([1, 1], 10)

    assert bench.counters["decode_requests_d3_b2"] == 1
    assert bench.counters["decode_tokens_d3_b2"] == 3


def test_under_overlap_an_interval_counts_only_after_two_steps_of_the_same_kind():
    bench = Bench(is_overlapped=True)

    for depth, step_us in [(3, 10), (3, 11), (3, 12), (3, 9), (0, 13), (0, 14), (0, 15), (0, 16)]:
        bench.decode([1], step_us, depth)

    assert bench.counters["decode_us_d3_b1"] == 12
    assert bench.counters["decode_us_d0_b1"] == 15


def test_a_block_leaves_out_its_first_step_and_times_all_but_the_last_of_the_others(bench: Bench):
    blocks = Blocks(4, 1, 3)

    for step in range(8):
        place = blocks.place(step)
        bench.decode([1 + place.index, step], 100 + step, turn=Turn(ORDER, place, 9 if place.is_candidate else 4))
    bench.decode([1, 1], 1)

    first, second = bench.said
    assert (first.pair, first.index, second.index) == (0, 0, 1)
    assert {first.version, second.version} == {4, 9}
    assert (first.candidate, first.seed, first.num_draft_steps) == (9, 3, 3)
    assert (first.num_steps, first.num_requests, first.num_tokens) == (3, 6, 3 + 1 + 2 + 3)
    assert (second.num_steps, second.num_requests, second.num_tokens) == (3, 6, 6 + 5 + 6 + 7)
    assert (first.num_timed_steps, first.num_timed_tokens, first.wall_us) == (2, 2 + 1 + 2, 101 + 102)
    assert (second.num_timed_steps, second.num_timed_tokens, second.wall_us) == (2, 4 + 5 + 6, 105 + 106)


def test_under_overlap_a_block_times_nothing_that_holds_the_copy_before_its_first_step():
    """The scheduler comes to step s + 1 when the device is through with s - 1."""
    bench, blocks = Bench(is_overlapped=True), Blocks(5, 1, 3)
    step_us, copy_us, ends_us = 10, 7, [0, 0]

    for step in range(10):
        place = blocks.place(step)
        bench.now_us = ends_us[-2]
        bench.decode([1], 0, turn=Turn(ORDER, place, 9 if place.is_candidate else 4))
        ends_us.append(ends_us[-1] + step_us + copy_us * (place.step == 0))
    bench.now_us = ends_us[-2]
    bench.decode([1], 0)
    bench.decode([1], 0)

    assert [(ended.num_timed_steps, ended.wall_us) for ended in bench.said] == [(2, 2 * step_us)] * 2


def test_a_block_with_a_prefill_in_it_keeps_its_tokens_and_loses_that_interval(bench: Bench):
    blocks = Blocks(4, 1, 3)

    for step in range(4):
        if step == 2:
            bench.meter.interrupt()
        bench.decode([2], 100 + step, turn=Turn(ORDER, blocks.place(step), 4))

    assert (bench.said[0].num_steps, bench.said[0].num_tokens) == (3, 6)
    assert (bench.said[0].num_timed_steps, bench.said[0].wall_us) == (1, 102)


def test_a_block_that_is_cut_short_is_not_told(bench: Bench):
    blocks = Blocks(4, 1, 3)

    for step in range(3):
        bench.decode([2], 100, turn=Turn(ORDER, blocks.place(step), 4))
    bench.decode([2], 100)

    assert bench.said == []
