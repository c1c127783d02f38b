"""A device that does everything as late as a GPU may: copies aside run only when somebody waits for them."""

from collections import deque
from contextlib import contextmanager

import torch

GARBAGE = 0x7F


def garble(tensor: torch.Tensor) -> None:
    """What a graph's next replay, or a slot's next user, leaves behind."""
    tensor.view(-1).view(torch.uint8).fill_(GARBAGE)


class LateEvent:
    def __init__(self, device: "LateDevice", number: int):
        self._device = device
        self.number = number

    def wait(self) -> None:
        self._device.num_waits += 1
        self._device.run_until(self.number)

    def is_done(self) -> bool:
        return self._device.num_run >= self.number


class LateDevice:
    """One side stream, in order. afters: what each copy was told to come after."""

    def __init__(self, free_bytes: int | None = None):
        self.num_run = 0
        self.num_waits = 0
        """of a thread of the host"""
        self.num_pinned_bytes = 0
        self.afters: list = []
        self.is_forward = False
        self._free_bytes = free_bytes
        self._waiting: deque = deque()
        self._num_asked = 0

    def pinned(self, shape, dtype) -> torch.Tensor:
        tensor = torch.empty(tuple(shape), dtype=dtype)
        garble(tensor)
        self.num_pinned_bytes += tensor.nbytes
        return tensor

    def copy_aside(self, pairs, after=None) -> LateEvent:
        self._num_asked += 1
        self.afters.append(after)
        self._waiting.append(list(pairs))
        return LateEvent(self, self._num_asked)

    def mark(self) -> LateEvent:
        return LateEvent(self, 0)

    def follow(self, event: LateEvent) -> None:
        self.run_until(event.number)

    @contextmanager
    def forwards(self):
        self.is_forward = True
        yield
        self.is_forward = False

    def free_bytes(self) -> int | None:
        return self._free_bytes

    def run_until(self, number: int) -> None:
        while self.num_run < number:
            for destination, source in self._waiting.popleft():
                destination.copy_(source)
            self.num_run += 1
