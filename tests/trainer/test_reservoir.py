"""Uniform samples of a stream that forgets, in equal shares of its clusters."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from onlinespec.trainer.reservoir import Reservoir, Strata, shares
from tests.draft.tiny import build_sample

SAMPLE = build_sample(0, 3, 3)


def numbered(number: int, ended_s: float = 0.0):
    return replace(SAMPLE, request=number, ended_s=ended_s)


def requests(samples) -> list[int]:
    return [sample.request for sample in samples]


def assert_uniform(counts: Counter[int], alive, total: int) -> None:
    expected = total / len(alive)
    assert set(counts) == set(alive)
    assert all(abs(counts[number] - expected) < 5 * expected**0.5 for number in alive)


@pytest.mark.parametrize("has_expiry", [False, True])
def test_the_reservoir_is_a_uniform_sample_of_what_has_not_expired(has_expiry):
    counts: Counter[int] = Counter()
    generator = torch.Generator().manual_seed(0)
    num_runs, total = 1500, 0
    for _ in range(num_runs):
        reservoir = Reservoir(5, generator)
        for number in range(12):
            reservoir.offer(numbered(number, ended_s=number))
            if has_expiry:
                reservoir.expire(number - 7.0)
        counts.update(requests(reservoir.samples))
        total += len(reservoir.samples)

    assert_uniform(counts, range(4, 12) if has_expiry else range(12), total)
    assert total / num_runs > 3


def test_it_stays_uniform_when_its_capacity_shrinks_while_requests_come_and_expire():
    counts: Counter[int] = Counter()
    generator = torch.Generator().manual_seed(1)
    num_runs, total = 1500, 0
    for _ in range(num_runs):
        reservoir = Reservoir(8, generator)
        for number in range(16):
            reservoir.offer(numbered(number, ended_s=number))
            reservoir.expire(number - 9.0)
            if number == 11:
                reservoir.resize(4)
                assert len(reservoir.samples) <= 4
        counts.update(requests(reservoir.samples))
        total += len(reservoir.samples)

    assert_uniform(counts, range(6, 16), total)
    assert total / num_runs > 2.5


def test_two_clusters_that_become_one_leave_a_uniform_sample_of_both():
    counts: Counter[int] = Counter()
    generator = torch.Generator().manual_seed(2)
    num_runs, total = 1500, 0
    for _ in range(num_runs):
        large, small = Reservoir(4, generator), Reservoir(4, generator)
        for number in range(12):
            large.offer(numbered(number))
        for number in range(12, 18):
            small.offer(numbered(number))
        large.absorb(small)
        assert large.num_offered == 18
        counts.update(requests(large.samples))
        total += len(large.samples)

    assert_uniform(counts, range(18), total)
    assert total == 6 * num_runs


def test_clusters_share_the_capacity_equally_and_lend_what_they_do_not_use():
    assert shares([100, 100, 100], 30) == [10, 10, 10]
    assert shares([100, 4, 100], 30) == [13, 4, 13]
    assert shares([100, 4, 7], 30) == [19, 4, 7]
    assert shares([1, 2, 3], 30) == [1, 2, 3]
    assert sum(shares([50, 60, 70], 31)) == 31
    assert shares([], 5) == []


def test_a_rare_cluster_keeps_its_share_beside_a_flood_and_memory_is_bounded():
    strata = Strata(20, torch.Generator().manual_seed(0))
    sizes = []
    for number in range(400):
        strata.offer(numbered(number), cluster=0)
        sizes.append(len(strata.samples))
    lent = strata.sizes()
    for number in range(400, 430):
        strata.offer(numbered(number), cluster=7)
        sizes.append(len(strata.samples))
    for number in range(430, 800):
        strata.offer(numbered(number), cluster=0)
        sizes.append(len(strata.samples))

    assert lent == {0: 20}
    assert strata.sizes() == {0: 10, 7: 10}
    assert max(sizes) == 20


def test_what_expires_makes_room_for_others():
    strata = Strata(10, torch.Generator().manual_seed(0))
    for number in range(10):
        strata.offer(numbered(number, ended_s=0.0), cluster=number % 2)
    strata.expire(before_s=1.0)

    for number in range(10, 20):
        strata.offer(numbered(number, ended_s=2.0), cluster=0)

    assert strata.sizes() == {0: 10}


def test_a_cluster_that_shrank_by_expiry_keeps_all_that_still_fits():
    strata = Strata(100, torch.Generator().manual_seed(0))
    for number in range(10):
        strata.offer(numbered(number, ended_s=number), cluster=0)
    strata.expire(before_s=5.0)

    for number in range(10, 13):
        strata.offer(numbered(number, ended_s=number), cluster=0)

    assert sorted(requests(strata.samples)) == [5, 6, 7, 8, 9, 10, 11, 12]


def test_the_places_of_expired_requests_are_not_kept_from_another_cluster():
    strata = Strata(12, torch.Generator().manual_seed(0))
    for number in range(10):
        strata.offer(numbered(number, ended_s=number), cluster=0)
    strata.expire(before_s=9.0)

    for number in range(10, 40):
        strata.offer(numbered(number, ended_s=9.0), cluster=1)

    assert strata.sizes() == {0: 1, 1: 11}
