"""Switchback: two resident versions take turns in blocks of decode steps.

Blocks come in pairs of adjacent ones, incumbent and candidate in an order tossed by a seeded coin, so that
neither load nor traffic that moves slowly favours one of them, and nobody can foresee which comes first.
A step is one decode iteration of the batch. Every rank counts the same steps from the same order and tosses
the same coins, so all of them change at the same iteration; no clock takes part.
"""

import random
from dataclasses import dataclass
from typing import Protocol

from onlinespec.wire.messages import StartSwitchback


@dataclass(frozen=True)
class Place:
    """Where a decode step stands: the pair, the block in it (0 or 1) and the step in that block."""

    pair: int
    index: int
    step: int
    is_candidate: bool
    is_last: bool
    """of its block"""


class Blocks:
    """Decides; pure. Step s of `2 * block_steps * num_pairs` belongs to block s // block_steps."""

    def __init__(self, block_steps: int, num_pairs: int, seed: int):
        self._block_steps = block_steps
        coin = random.Random(seed)
        self._is_candidate_first = [coin.random() < 0.5 for _ in range(num_pairs)]

    def place(self, step: int) -> Place | None:
        """None after the last block."""
        block, step_in_block = divmod(step, self._block_steps)
        pair, index = divmod(block, 2)
        if pair >= len(self._is_candidate_first):
            return None
        is_candidate = self._is_candidate_first[pair] == (index == 0)
        return Place(pair, index, step_in_block, is_candidate, step_in_block == self._block_steps - 1)


class Residents(Protocol):
    """Holds both versions, on the device where there is room; see `swap.Swapper`."""

    version: int
    """the one that drafts now"""

    @property
    def incumbent(self) -> int: ...

    def put(self, version: int) -> None:
        """Copy a resident version into the draft. Raises: SwapError."""

    def drop_residents(self) -> None: ...


class Switchback:
    """Applies, on one rank. Whatever ends it, the incumbent's weights are in service afterwards."""

    def __init__(self, order: StartSwitchback, residents: Residents):
        self.order = order
        self.is_running = True
        self._blocks = Blocks(order.block_steps, order.num_pairs, order.seed)
        self._residents = residents
        self._num_steps = 0

    def before_decode(self) -> Place | None:
        """Put the version in service that the next decode step is for. None: it has ended.

        Raises: what the copy raises; it has ended then too.
        """
        if not self.is_running:
            return None
        place = self._blocks.place(self._num_steps)
        self._num_steps += 1
        if place is None:
            self.end()
            return None
        is_sound = False
        try:
            self._put(self.order.version if place.is_candidate else self._residents.incumbent)
            is_sound = True
        finally:
            if not is_sound:
                self.end(is_damaged=True)
        return place

    def end(self, is_damaged: bool = False) -> None:
        """The incumbent's weights back in service. Does nothing where it has ended.

        is_damaged: a copy broke off, so what is in service is neither version, whatever it is called.
        """
        if not self.is_running:
            return
        self.is_running = False
        try:
            if is_damaged:
                self._residents.put(self._residents.incumbent)
            else:
                self._put(self._residents.incumbent)
        finally:
            self._residents.drop_residents()

    def _put(self, version: int) -> None:
        if self._residents.version != version:
            self._residents.put(version)
