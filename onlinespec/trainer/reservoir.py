"""Requests kept after they left the recent window: a uniform sample of each task cluster, in equal shares.

Equal shares keep a task that is rare, or that stopped for a while, in the replay of one that is not. What a
small cluster leaves of its share is lent to the others and taken back, at random, when it comes to claim it.
"""

import heapq
from collections.abc import Sequence
from typing import Any

import torch

from onlinespec.draft.sample import Sample


class Reservoir:
    """A uniform sample of bounded size of everything offered that has not expired.

    Expiry leaves holes that later offers fill with the probability that keeps the sample uniform; plain
    reservoir sampling would fill them with whatever comes next. A smaller capacity drops at random. A larger one
    lets the next offers in, since what was dropped is gone: until that has expired, newer requests are favoured.

    Source: Gemulla, Lehner, Haas 2006, "A Dip in the Reservoir", random pairing.
    """

    def __init__(self, capacity: int, generator: torch.Generator):
        self.samples: list[Sample] = []
        self.capacity = capacity
        self._generator = generator
        self._offered_s: list[float] = []
        """heap of the end times of all that was offered and has not expired, for their number only"""
        self._holes_inside = 0
        self._holes_outside = 0

    @property
    def num_offered(self) -> int:
        """Requests offered that have not expired, kept or not."""
        return len(self._offered_s)

    @property
    def num_places(self) -> int:
        """Requests offered, holes like those alive: the capacity at which nothing would be dropped."""
        return self.num_offered + self._holes_inside + self._holes_outside

    @property
    def num_kept(self) -> int:
        """Samples kept and places kept for such as expired."""
        return len(self.samples) + self._holes_inside

    def offer(self, sample: Sample) -> None:
        """Take the sample or not."""
        heapq.heappush(self._offered_s, sample.ended_s)
        holes = self._holes_inside + self._holes_outside
        if holes:
            is_inside = self._below(holes) < self._holes_inside
            self._holes_inside -= is_inside
            self._holes_outside -= not is_inside
            if is_inside:
                self.samples.append(sample)
        elif len(self.samples) < self.capacity:
            self.samples.append(sample)
        elif (place := self._below(self.num_offered)) < self.capacity:
            self.samples[place] = sample

    def expire(self, before_s: float) -> None:
        """Forget what ended earlier."""
        num_left = 0
        while self._offered_s and self._offered_s[0] < before_s:
            heapq.heappop(self._offered_s)
            num_left += 1
        if not num_left:
            return
        kept = [sample for sample in self.samples if sample.ended_s >= before_s]
        num_inside = len(self.samples) - len(kept)
        self._holes_inside += num_inside
        self._holes_outside += num_left - num_inside
        self.samples = kept
        if len(kept) == self.num_offered:  # nothing alive is outside: a fresh start, no place is kept for the dead
            self._holes_inside = self._holes_outside = 0

    def resize(self, capacity: int) -> None:
        """Drop at random, holes like samples, what is beyond the capacity."""
        self.capacity = capacity
        while (size := self.num_kept) > capacity:
            if self._below(size) < len(self.samples):
                self._drop_one()
            else:
                self._holes_inside -= 1
                self._holes_outside += 1

    def absorb(self, other: "Reservoir") -> None:
        """Take over another's requests: of both the share that the more thinned of them still has."""
        parts = [part for part in (self, other) if part.num_offered]
        frac = min((len(part.samples) / part.num_offered for part in parts), default=1.0)
        for part in parts:
            while len(part.samples) > round(frac * part.num_offered):
                part._drop_one()
        self.samples += other.samples
        self._offered_s = list(heapq.merge(sorted(self._offered_s), sorted(other._offered_s)))
        self._holes_inside += other._holes_inside
        self._holes_outside += other._holes_outside

    def _drop_one(self) -> None:
        place = self._below(len(self.samples))
        self.samples[place] = self.samples[-1]
        self.samples.pop()

    def _below(self, bound: int) -> int:
        return int(torch.randint(bound, (1,), generator=self._generator))

    def state(self) -> dict[str, Any]:
        """A copy of the bookkeeping; samples by their request number."""
        return {
            "samples": [sample.request for sample in self.samples],
            "capacity": self.capacity,
            "offered_s": list(self._offered_s),
            "holes": [self._holes_inside, self._holes_outside],
        }

    def load_state(self, state: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Go on where the reservoir that gave this state stood. samples: those it names, in its order."""
        self.samples = list(samples)
        self.capacity = state["capacity"]
        self._offered_s = list(state["offered_s"])
        self._holes_inside, self._holes_outside = state["holes"]


class Strata:
    """One reservoir per task cluster; together they never hold more than `capacity` samples."""

    def __init__(self, capacity: int, generator: torch.Generator):
        self._capacity = self._max_capacity = capacity
        self._generator = generator
        self._of: dict[int, Reservoir] = {}

    @property
    def samples(self) -> list[Sample]:
        return [sample for reservoir in self._of.values() for sample in reservoir.samples]

    def sizes(self) -> dict[int, int]:
        """Samples kept of each cluster."""
        return {cluster: len(reservoir.samples) for cluster, reservoir in self._of.items()}

    def offer(self, sample: Sample, cluster: int) -> None:
        """Give the sample's cluster the share it may claim, then take the sample or not."""
        if cluster not in self._of:
            self._of[cluster] = Reservoir(0, self._generator)
        wanted = [reservoir.num_places + (name == cluster) for name, reservoir in self._of.items()]
        for reservoir, share in zip(self._of.values(), shares(wanted, self._capacity), strict=True):
            reservoir.resize(share)
        self._of[cluster].offer(sample)

    def fit(self, max_bytes: int) -> None:
        """Hold no more bytes of rows: drop at random, from the largest cluster first, and lower the capacity to what
        is left. It rises again, sample by sample, while there is room for one more of the mean size."""
        samples = self.samples
        num_bytes = sum(sample.num_bytes for sample in samples)
        if num_bytes * (len(samples) + 1) <= max_bytes * max(1, len(samples)):
            self._capacity = min(self._capacity + 1, self._max_capacity)
        while num_bytes > max_bytes:
            largest = max(self._of.values(), key=lambda reservoir: reservoir.num_kept)
            num_bytes -= sum(sample.num_bytes for sample in largest.samples)
            largest.resize(largest.num_kept - 1)
            num_bytes += sum(sample.num_bytes for sample in largest.samples)
            self._capacity = sum(reservoir.num_kept for reservoir in self._of.values())

    def merge(self, gone: int, into: int) -> None:
        """Two clusters turned out to be one."""
        other = self._of.pop(gone, None)
        if other is not None:
            self._of.setdefault(into, Reservoir(0, self._generator)).absorb(other)

    def expire(self, before_s: float) -> None:
        """Forget what ended earlier, and clusters of which nothing is left."""
        for cluster, reservoir in list(self._of.items()):
            reservoir.expire(before_s)
            if not reservoir.num_offered:
                del self._of[cluster]

    def clear(self) -> None:
        self._of.clear()

    def state(self) -> list[tuple[int, dict[str, Any]]]:
        return [(cluster, reservoir.state()) for cluster, reservoir in self._of.items()]

    def load_state(self, state: Sequence[tuple[int, dict[str, Any]]], samples: dict[int, Sample]) -> None:
        """samples: by request number. Raises: KeyError where one that the state names is missing."""
        self._of.clear()
        for cluster, of_cluster in state:
            self._of[cluster] = Reservoir(0, self._generator)
            self._of[cluster].load_state(of_cluster, [samples[request] for request in of_cluster["samples"]])


def shares(wanted: Sequence[int], capacity: int) -> list[int]:
    """Divide a capacity equally, nobody getting more than wanted while another wants more."""
    found = [0] * len(wanted)
    left = capacity
    by_want = sorted(range(len(wanted)), key=lambda place: wanted[place])
    for num_served, place in enumerate(by_want):
        found[place] = min(wanted[place], -(-left // (len(wanted) - num_served)))
        left -= found[place]
    return found
