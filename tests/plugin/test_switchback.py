"""Blocks are even, paired and tossed by the seed alone; whatever ends a switchback, the incumbent is back."""

from itertools import pairwise

import pytest

from onlinespec.errors import SwapError
from onlinespec.plugin.switchback import Blocks, Place, Switchback
from onlinespec.wire.messages import StartSwitchback

INCUMBENT, CANDIDATE = 4, 9


def order(block_steps: int = 3, num_pairs: int = 4, seed: int = 0) -> StartSwitchback:
    return StartSwitchback(CANDIDATE, "p", "d", block_steps, num_pairs, seed)


def places(block_steps: int, num_pairs: int, seed: int) -> list[Place]:
    blocks, found, step = Blocks(block_steps, num_pairs, seed), [], 0
    while (place := blocks.place(step)) is not None:
        found.append(place)
        step += 1
    return found


class Residents:
    """Two versions on a device that remembers what was copied; a copy of `broken` breaks off."""

    def __init__(self, broken: int | None = None):
        self.version = self.incumbent = INCUMBENT
        self.copied: list[int] = []
        self.is_dropped = False
        self.broken = broken

    def put(self, version: int) -> None:
        assert not self.is_dropped
        self.version = version
        if version == self.broken:
            self.broken = None
            raise SwapError("broke off")
        self.copied.append(version)

    def drop_residents(self) -> None:
        self.is_dropped = True


@pytest.mark.parametrize(("block_steps", "num_pairs"), [(3, 1), (4, 5), (7, 2)])
def test_every_pair_has_one_block_of_each_version_and_every_block_the_same_steps(block_steps: int, num_pairs: int):
    found = places(block_steps, num_pairs, seed=1)

    assert len(found) == 2 * block_steps * num_pairs
    for pair in range(num_pairs):
        blocks = [[p for p in found if (p.pair, p.index) == (pair, index)] for index in (0, 1)]
        assert [[p.step for p in block] for block in blocks] == [list(range(block_steps))] * 2
        assert [len({p.is_candidate for p in block}) for block in blocks] == [1, 1]
        assert {block[0].is_candidate for block in blocks} == {True, False}
        assert all([p.is_last for p in block] == [False] * (block_steps - 1) + [True] for block in blocks)


def test_the_order_inside_pairs_is_the_seeds_and_both_orders_come():
    def firsts(seed: int) -> list[bool]:
        return [p.is_candidate for p in places(3, 400, seed) if p.index == 0 and p.step == 0]

    assert firsts(5) == firsts(5) != firsts(6)
    assert 160 < sum(firsts(5)) < 240


def test_a_step_is_drafted_by_the_version_of_its_block_and_a_version_is_copied_at_changes_only():
    residents = Residents()
    switchback = Switchback(order(), residents)

    drafted = []
    while (place := switchback.before_decode()) is not None:
        drafted.append(residents.version)
        assert drafted[-1] == (CANDIDATE if place.is_candidate else INCUMBENT)

    changes = sum(a != b for a, b in pairwise([INCUMBENT, *drafted, INCUMBENT]))
    assert len(drafted) == 2 * 3 * 4
    assert len(residents.copied) == changes


def test_after_the_last_pair_the_incumbent_is_back_and_nothing_is_copied_any_more():
    residents = Residents()
    switchback = Switchback(order(num_pairs=1), residents)

    found = [switchback.before_decode() for _ in range(9)]

    assert [place is None for place in found] == [False] * 6 + [True] * 3
    assert residents.version == INCUMBENT
    assert residents.is_dropped
    assert not switchback.is_running


def test_an_end_in_the_middle_of_a_candidates_block_brings_the_incumbent_back_at_once():
    residents = Residents()
    switchback = Switchback(order(), residents)
    while residents.version == INCUMBENT:
        switchback.before_decode()

    switchback.end()
    switchback.end()

    assert residents.version == residents.copied[-1] == INCUMBENT
    assert residents.copied.count(INCUMBENT) == 1
    assert switchback.before_decode() is None


@pytest.mark.parametrize("broken", [CANDIDATE, INCUMBENT])
def test_a_copy_that_breaks_off_ends_it_with_the_incumbent_copied_whole(broken: int):
    residents = Residents(broken)
    switchback = Switchback(order(), residents)

    def play() -> None:
        while switchback.before_decode() is not None:
            pass

    with pytest.raises(SwapError, match="broke off"):
        play()

    assert residents.version == residents.copied[-1] == INCUMBENT
    assert residents.is_dropped
    assert not switchback.is_running
