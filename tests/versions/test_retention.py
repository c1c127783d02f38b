"""What retention chooses: its rules as properties over arbitrary stores, and by example."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onlinespec.config import VersionsConfig
from onlinespec.versions.retention import choose, milestones

QUICK = settings(deadline=None, derandomize=True, database=None)
NUMBERS = st.integers(1, 60)
SIZES = st.dictionaries(NUMBERS, st.integers(0, 1000))
PROMOTED = st.lists(NUMBERS, unique=True)
PROTECTED = st.sets(NUMBERS)
FREE = st.integers(0, 20_000)
CONFIGS = st.builds(
    VersionsConfig,
    keep_last=st.integers(1, 12),
    milestone_every=st.integers(1, 12),
    keep_milestones=st.integers(0, 6),
    min_free_bytes=st.integers(0, 20_000),
)


@QUICK
@given(SIZES, PROMOTED, PROTECTED, FREE, CONFIGS)
def test_nothing_protected_or_absent_is_deleted_and_nothing_twice(sizes, promoted, protected, free_bytes, config):
    deletion = choose(sizes, promoted, protected, free_bytes, config)

    assert set(deletion.versions) <= sizes.keys() - protected
    assert len(set(deletion.versions)) == len(deletion.versions)
    assert deletion.freed_bytes == sum(sizes[version] for version in deletion.versions)


@QUICK
@given(SIZES, PROMOTED, PROTECTED, FREE, CONFIGS)
def test_the_newest_and_milestones_go_only_for_want_of_room(sizes, promoted, protected, free_bytes, config):
    deletion = choose(sizes, promoted, protected, free_bytes, config)

    kept = {*sorted(sizes)[-config.keep_last :], *milestones(promoted, config), *protected}
    assert set(deletion.surplus) == sizes.keys() - kept
    if free_bytes >= config.min_free_bytes:
        assert deletion.for_room == ()


@QUICK
@given(SIZES, PROMOTED, PROTECTED, FREE, CONFIGS)
def test_afterwards_there_is_room_or_nothing_left_to_delete(sizes, promoted, protected, free_bytes, config):
    deletion = choose(sizes, promoted, protected, free_bytes, config)

    has_room = free_bytes + deletion.freed_bytes >= config.min_free_bytes
    assert has_room or set(deletion.versions) == sizes.keys() - protected
    assert (deletion.notice is None) == (has_room and not deletion.for_room)


@QUICK
@given(SIZES, PROMOTED, PROTECTED, FREE, CONFIGS)
def test_for_room_the_oldest_go_first_and_no_more_than_needed(sizes, promoted, protected, free_bytes, config):
    deletion = choose(sizes, promoted, protected, free_bytes, config)

    spared = sizes.keys() - protected - set(deletion.versions)
    assert all(gone < version for gone in deletion.for_room for version in spared)
    if deletion.for_room:
        freed_before = deletion.freed_bytes - sizes[deletion.for_room[-1]]
        assert free_bytes + freed_before < config.min_free_bytes


@QUICK
@given(PROMOTED, CONFIGS)
def test_a_milestone_is_each_so_many_th_promotion_and_the_newest_of_them_count(promoted, config):
    every = [version for count, version in enumerate(promoted, start=1) if count % config.milestone_every == 0]

    found = milestones(promoted, config)

    assert len(found) == min(len(every), config.keep_milestones)
    assert found == set(every[len(every) - len(found) :])


@pytest.mark.parametrize("num_versions", [1, 4, 5, 14, 99, 300])
def test_a_long_life_of_promotions_keeps_a_bounded_store(num_versions):
    config = VersionsConfig(keep_last=4, milestone_every=5, keep_milestones=3, min_free_bytes=0)
    held: dict[int, int] = {}
    for version in range(1, num_versions + 1):
        held[version] = 1
        deletion = choose(held, range(1, version + 1), {version, version - 1}, 0, config)
        held = {number: 1 for number in held if number not in deletion.versions}

    assert len(held) <= 4 + 3
    assert milestones(range(1, num_versions + 1), config) <= held.keys()


@pytest.mark.parametrize(
    ("free_bytes", "surplus", "for_room"),
    [(100, (1, 3), ()), (50, (1, 3), ()), (49, (1, 3), (2,)), (30, (1, 3), (2, 5)), (0, (1, 3), (2, 5))],
)
def test_a_store_of_six_by_example(free_bytes, surplus, for_room):
    config = VersionsConfig(keep_last=2, milestone_every=2, min_free_bytes=70)

    deletion = choose(dict.fromkeys(range(1, 7), 10), [1, 2, 3], {4, 6}, free_bytes, config)

    assert (deletion.surplus, deletion.for_room) == (surplus, for_room)
