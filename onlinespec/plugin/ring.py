"""A ring of pinned memory: where rows wait between the device and the sender.

It is allocated once, since pinning memory stops the driver for milliseconds. Slots are taken in the order of the
passes; room comes back in that order too, when the oldest slot is released or nobody holds it any more (a pass
whose commit never came). A slot released while its copy still runs is safe: copies into the ring follow each other
on one stream. A full ring gives None: the rows are dropped and counted, nobody waits.
"""

import math
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from onlinespec.config import CaptureConfig
from onlinespec.plugin.device import Device

_ALIGN = 256
_BESIDE_ROWS_BYTES = 2**20
"""teachers and scales of two chunks, each tensor aligned"""


@dataclass
class _Span:
    start: int
    end: int
    is_free: bool = False


class Slot:
    """Consecutive bytes of the ring, until it is released or collected."""

    def __init__(self, bytes_: torch.Tensor, span: _Span):
        self._bytes = bytes_
        self._release = weakref.finalize(self, setattr, span, "is_free", True)
        self._release.atexit = False

    def like(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Uninitialised views of the slot, one for each tensor's shape and dtype; of the sizes it was taken for."""
        views, start = [], 0
        for tensor in tensors:
            views.append(self._bytes[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
            start += _aligned(tensor.nbytes)
        return views

    def release(self) -> None:
        """Its views must not be read after this. Again: does nothing."""
        self._release()


class Ring:
    """See the module's docstring. buffer: uint8 [n]; taken on one thread, released on any."""

    def __init__(self, buffer: torch.Tensor):
        self._buffer = buffer
        self._spans: deque[_Span] = deque()
        self._lock = threading.Lock()

    def take(self, sizes: Sequence[int]) -> Slot | None:
        """Room for tensors of so many bytes each; None where there is none now."""
        num_bytes = sum(map(_aligned, sizes))
        with self._lock:
            while self._spans and self._spans[0].is_free:
                self._spans.popleft()
            start = self._room(num_bytes)
            if start is None:
                return None
            span = _Span(start, start + num_bytes)
            self._spans.append(span)
        return Slot(self._buffer[span.start : span.end], span)

    def _room(self, num_bytes: int) -> int | None:
        size = len(self._buffer)
        if not self._spans:
            return 0 if num_bytes <= size else None
        tail, head = self._spans[0].start, self._spans[-1].end
        if self._spans[-1].start < tail:  # the newest went round
            return head if head + num_bytes <= tail else None
        if head + num_bytes <= size:
            return head
        return 0 if num_bytes <= tail else None


def build_ring(device: Device, config: CaptureConfig, chunk_values: int, dtype: torch.dtype) -> Ring:
    """Of `config.ring_bytes`, or of two prefill chunks where those are more. chunk_values: captured values of one, of
    the target's dtype."""
    value_bytes = 1 if config.row_dtype == "float8" else dtype.itemsize
    num_bytes = max(config.ring_bytes, 2 * chunk_values * value_bytes + _BESIDE_ROWS_BYTES)
    return Ring(device.pinned((num_bytes,), torch.uint8))


def _aligned(num_bytes: int) -> int:
    return math.ceil(num_bytes / _ALIGN) * _ALIGN
