"""A device that does everything as late as a GPU may: what is on a stream runs only when somebody waits for it.

Work on a stream comes behind what was there before it and behind the events it was told to follow, and behind nothing
else. What a GPU does at once is done at once here too: a copy from host to host, on the thread that asks for it.
Memory of a source that its owner drops is not modelled: holding it is the seam's own duty, see `test_device`.
"""

import threading
from collections.abc import Callable
from contextlib import contextmanager

import torch

GARBAGE = 0x7F


def garble(tensor: torch.Tensor) -> None:
    """What a graph's next replay, or a slot's next user, leaves behind."""
    tensor.view(-1).view(torch.uint8).fill_(GARBAGE)


class Work:
    """On a stream; runs once, after `before`."""

    def __init__(self, before: list["Work"], run: Callable[[], None] | None):
        self.is_run = False
        self._before = before
        self._run = run

    def finish(self) -> None:
        if self.is_run:
            return
        for work in self._before:
            work.finish()
        if self._run is not None:
            self._run()
        self.is_run = True
        self._before = []


class LateEvent:
    def __init__(self, device: "LateDevice", work: Work):
        self._device = device
        self.work = work

    def wait(self) -> None:
        self._device.waiters.append(threading.get_ident())
        self._device.finish(self.work)

    def is_done(self) -> bool:
        return self.work.is_run


class LateDevice:
    """Three kinds of streams: of forwards, of copies aside, and what is else current on each thread."""

    def __init__(self, free_bytes: int | None = None):
        self.num_asked = 0
        """copies aside"""
        self.num_run = 0
        """copies aside that a stream made"""
        self.waiters: list[int] = []
        """the thread of each wait on the host"""
        self.num_pinned_bytes = 0
        self._free_bytes = free_bytes
        self._pinned: list[torch.Tensor] = []
        self._last: dict[str | int, Work] = {}
        self._entered = threading.local()

    @property
    def num_waits(self) -> int:
        return len(self.waiters)

    @property
    def is_forward(self) -> bool:
        return self._current == "forward"

    @property
    def _current(self) -> str | int:
        return getattr(self._entered, "stream", threading.get_ident())

    def pinned(self, shape, dtype) -> torch.Tensor:
        tensor = torch.empty(tuple(shape), dtype=dtype)
        garble(tensor)
        self.num_pinned_bytes += tensor.nbytes
        self._pinned.append(tensor)
        return tensor

    def copy(self, destinations, sources) -> None:
        self._queue(self._current, lambda: torch._foreach_copy_(destinations, sources))

    def copy_aside(self, pairs, after=None) -> LateEvent:
        self.num_asked += 1
        late = []
        for destination, source in pairs:
            if self._is_pinned(destination) and self._is_pinned(source):
                destination.copy_(source)
            else:
                late.append((destination, source))

        def run() -> None:
            for destination, source in late:
                destination.copy_(source)
            self.num_run += bool(late)

        event = self.mark() if after is None else after
        return LateEvent(self, self._queue("aside", run, event.work))

    def mark(self) -> LateEvent:
        return LateEvent(self, self._queue(self._current, None))

    def follow(self, event: LateEvent) -> None:
        self._queue(self._current, None, event.work)

    @contextmanager
    def forwards(self):
        now = self.mark()
        self._entered.stream = "forward"
        try:
            self.follow(now)
            yield
        finally:
            del self._entered.stream

    def free_bytes(self) -> int | None:
        return self._free_bytes

    def finish(self, work: Work) -> None:
        work.finish()

    def synchronize(self) -> None:
        """All there is, copies aside last."""
        for stream in sorted(self._last, key=lambda stream: stream == "aside"):
            self.finish(self._last[stream])

    def _queue(self, stream: str | int, run: Callable[[], None] | None, *after: Work) -> Work:
        last = [self._last[stream]] if stream in self._last else []
        self._last[stream] = Work([*last, *after], run)
        return self._last[stream]

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        address = tensor.untyped_storage().data_ptr()
        return any(pinned.untyped_storage().data_ptr() == address for pinned in self._pinned)
