"""Streams, events and pinned memory behind one thin seam; all device code of the plugin goes through it.

What forwards run on is the *current* stream. A copy `aside` runs on one stream of ours, behind what it was told to
come after, and nothing waits for it but who asks: the sender's thread waits on this host, a forward waits on the
device. The scheduler's thread never waits. Source addresses must stay what they are until then, so what a CUDA
graph owns is cloned first.
"""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in the work of a stream."""

    def wait(self) -> None:
        """Block this thread until the work before it is done; never on the scheduler's thread."""

    def is_done(self) -> bool: ...


class Device(Protocol):
    """Where the draft's parameters are."""

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that the device copies to and from by itself; uninitialised."""

    def copy(self, destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        """One after another, on the current stream; this thread does not wait."""

    def copy_aside(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Event | None = None) -> Event:
        """Copy (destination, source) pairs on the side stream. after: None for what the current stream has so far.

        From host to host the copy is made at once, on this thread: no stream has it, and it comes after no event.
        """

    def mark(self) -> Event:
        """What the current stream has so far."""

    def follow(self, event: Event) -> None:
        """What the current stream gets from now on comes after the event; this thread does not wait."""

    def forwards(self) -> AbstractContextManager[Any]:
        """Makes the stream that forwards run on the current one, behind what the current one has so far."""

    def free_bytes(self) -> int | None:
        """Device memory nobody has; None where device and host are one."""


class Done:
    """The event of work that was done when it was asked for."""

    def wait(self) -> None: ...

    def is_done(self) -> bool:
        return True


class HostDevice:
    """A CPU: one stream, in order, no waiting."""

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def copy(self, destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        torch._foreach_copy_(destinations, sources)

    def copy_aside(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Event | None = None) -> Event:
        for destination, source in pairs:
            destination.copy_(source)
        return Done()

    def mark(self) -> Event:
        return Done()

    def follow(self, event: Event) -> None: ...

    def forwards(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def free_bytes(self) -> int | None:
        return None


class CudaEvent:
    """Its waiter sleeps; the default would spin and take the scheduler's core."""

    def __init__(self, stream: torch.cuda.Stream):
        self.event = torch.cuda.Event(blocking=True)
        self.event.record(stream)
        self._index = stream.device_index

    def wait(self) -> None:
        torch.cuda.set_device(self._index)  # see `CudaDevice`
        self.event.synchronize()

    def is_done(self) -> bool:
        return bool(self.event.query())


class CudaDevice:
    """A GPU. forward_stream: None where forwards run on the scheduler thread's current stream.

    What threads of ours may call first makes this GPU theirs: a thread begins with number 0, and would make a context
    of hundreds of megabytes on it, which is another rank's.

    Source: SGLang 0.5.23 managers/scheduler.py run_batch: only the overlap schedule enters forward_stream_ctx.
    """

    def __init__(self, device: torch.device, forward_stream: torch.cuda.Stream | None):
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._forward_stream = forward_stream
        # torch deals streams of one priority in turn from a pool, and again those in use. SGLang's (forward, schedule,
        # copy) all have the default one; behind a copy of rows, any of them would be late. A copy gains nothing by it.
        self._side = torch.cuda.Stream(device, priority=-1)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        torch.cuda.set_device(self._device)
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def copy(self, destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        # Each by the copy engines: a foreach copy is a kernel, and of few large tensors the slower one (SGLang 0.5.23
        # speculative/eagle_draft_extend_cuda_graph_runner.py says three times).
        for destination, source in zip(destinations, sources, strict=True):
            destination.copy_(source, non_blocking=True)

    def copy_aside(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Event | None = None) -> Event:
        torch.cuda.set_device(self._device)
        event = self.mark() if after is None else after
        with torch.cuda.stream(self._side):
            self.follow(event)
            for destination, source in pairs:
                destination.copy_(source, non_blocking=True)
                for tensor in (destination, source):
                    if tensor.is_cuda:  # its memory may not be given away before this stream is through with it
                        tensor.record_stream(self._side)
            return self.mark()

    def mark(self) -> Event:
        return CudaEvent(torch.cuda.current_stream(self._device))

    def follow(self, event: Event) -> None:
        if isinstance(event, CudaEvent):
            torch.cuda.current_stream(self._device).wait_event(event.event)

    def forwards(self) -> AbstractContextManager[Any]:
        if self._forward_stream is None:
            return contextlib.nullcontext()
        self._forward_stream.wait_stream(torch.cuda.current_stream(self._device))  # as SGLang before each pass
        return torch.cuda.stream(self._forward_stream)

    def free_bytes(self) -> int | None:
        return torch.cuda.mem_get_info(self._device)[0]


def build_device(device: torch.device, forward_stream: torch.cuda.Stream | None) -> Device:
    """For the device the draft's parameters are on. forward_stream: see `CudaDevice`."""
    return CudaDevice(device, forward_stream) if device.type == "cuda" else HostDevice()
