"""The embedding table is the target's own; its checksum before and after a version's first copy must be the same.

The sums are made on the device and read on the host when they have come, so the scheduler's thread never waits for
them. An alarm is about the server as it is from then on: it stays.
"""

from collections import deque
from dataclasses import dataclass

import torch

from onlinespec.errors import SwapError
from onlinespec.plugin.device import Device, Event


@dataclass(frozen=True)
class _Check:
    version: int
    sums_2: torch.Tensor
    """before and after, on the host"""
    came: Event

    def read(self) -> None:
        """Once it has come. Raises: SwapError where the table changed."""
        before, after = self.sums_2.tolist()
        if before != after:
            raise SwapError(f"version {self.version} changed the target's embedding table; restart the server now")


class TableChecks:
    """Of one rank. table: the embedding weight, [V, D]."""

    def __init__(self, table_VD: torch.Tensor, device: Device):
        self._table_VD = table_VD.detach()
        self._device = device
        self._open: deque[_Check] = deque()

    def sum(self) -> torch.Tensor:
        """On the current stream, float64 []. Row by row in float32 first: a sum of half precision in float64 makes a
        float64 copy of the whole table, 4.2 GB for Llama 3.1 8B (torch 2.13, aten ReduceOpsUtils.h)."""
        return self._table_VD.sum(1, dtype=torch.float32).sum(dtype=torch.float64)

    def expect_same(self, version: int, before: torch.Tensor) -> None:
        """Compare with now, once both have come. version: whose copy was in between."""
        sums_2 = torch.stack([before, self.sum()])
        on_host_2 = self._device.pinned((2,), torch.float64)
        came = self._device.copy_aside([(on_host_2, sums_2)])
        self._open.append(_Check(version, on_host_2, came))

    def poll(self) -> None:
        """On the scheduler's thread: read what has come. Raises: SwapError where the table changed, at every call."""
        while self._open and self._open[0].came.is_done():
            self._open[0].read()
            self._open.popleft()

    def wait(self) -> None:
        """On any other thread, for all that is open. Raises: SwapError where the table changed."""
        for check in list(self._open):
            check.came.wait()
            check.read()
