"""Which versions to delete: the newest stay, and milestones, and fewer of both where the disk is full. Pure."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from onlinespec.config import VersionsConfig


@dataclass(frozen=True)
class Deletion:
    """What to delete, and the room that makes."""

    surplus: tuple[int, ...]
    """versions beyond what the config keeps, ascending"""
    for_room: tuple[int, ...]
    """versions deleted besides, because the disk is full, ascending"""
    free_bytes: int
    """free before anything is deleted"""
    freed_bytes: int
    min_free_bytes: int

    @property
    def versions(self) -> tuple[int, ...]:
        return tuple(sorted((*self.surplus, *self.for_room)))

    @property
    def notice(self) -> str | None:
        """One line where the disk was full; None where it was not."""
        left_bytes = self.free_bytes + self.freed_bytes
        is_short = left_bytes < self.min_free_bytes
        if not self.for_room and not is_short:
            return None
        deleted = ", ".join(str(version) for version in self.versions) or "none, for none may be"
        return (
            f"{_gib(self.free_bytes)} of disk are free, versions.min_free_bytes wants {_gib(self.min_free_bytes)};"
            f" versions deleted: {deleted}; free now: {_gib(left_bytes)}"
            + ("; make room on that disk" if is_short else "")
        )


def milestones(promoted: Sequence[int], config: VersionsConfig) -> frozenset[int]:
    """Every so many-th promoted version, the newest of them. promoted: in the order they were, each once."""
    reached = promoted[config.milestone_every - 1 :: config.milestone_every]
    return frozenset(reached[max(len(reached) - config.keep_milestones, 0) :])


def choose(
    sizes: Mapping[int, int],
    promoted: Sequence[int],
    protected: Collection[int],
    free_bytes: int,
    config: VersionsConfig,
) -> Deletion:
    """Choose what to delete; never a protected version.

    sizes: bytes of every version in the store. promoted: see `milestones`. free_bytes: on the store's disk.
    The newest `keep_last` and the milestones stay while there is room; the oldest go first where there is none.
    """
    numbers = sorted(sizes)
    kept = {*numbers[-config.keep_last :], *milestones(promoted, config), *protected}
    surplus = tuple(number for number in numbers if number not in kept)
    freed_bytes = sum(sizes[number] for number in surplus)
    for_room: list[int] = []
    for number in numbers:
        if free_bytes + freed_bytes >= config.min_free_bytes:
            break
        if number not in protected and number not in surplus:
            for_room.append(number)
            freed_bytes += sizes[number]
    return Deletion(surplus, tuple(for_room), free_bytes, freed_bytes, config.min_free_bytes)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
