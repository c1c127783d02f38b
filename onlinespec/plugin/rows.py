"""Rows from the device to the sender, past the scheduler: clone, copy aside, gather where they are sent.

N rows of a pass, M of them with a teacher, A captured layers, D target width, V vocabulary, k teacher top-k.

The scheduler's thread launches three things and waits for none: a clone of the captured states (or their float8
form) and the teacher on the stream of the pass, where they come before any replay that overwrites a graph's
buffers; and a copy of both to pinned memory on a stream of ours. Which rows are kept is known at the commit; the
sender's thread waits for the copy, gathers them and gives the slot back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from onlinespec.plugin.device import Device, Event
from onlinespec.plugin.float8 import pack_rows
from onlinespec.plugin.ring import Ring, Slot
from onlinespec.plugin.teacher import teacher_of
from onlinespec.wire.frames import FrameHeader

INLINE_BYTES = 2**16
_BITS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}
"""dtypes without a numpy name travel as their bits"""


class RowCopier:
    """Takes rows of passes on one device. ring: pinned memory they wait in; is_float8: see `float8`."""

    def __init__(self, device: Device, ring: Ring, teacher_top_k: int, is_float8: bool):
        self._device = device
        self._ring = ring
        self._teacher_top_k = teacher_top_k
        self._is_float8 = is_float8

    def warm_up(self, place: torch.device, aux_width: int, vocab_size: int, dtype: torch.dtype) -> None:
        """Compile and load a GPU's kernels before any request. aux_width: A*D; dtype: of the captured states."""
        logits_1V = torch.zeros(1, vocab_size, device=place)
        for lens_1 in (None, torch.ones(1, dtype=torch.int32, device=place)):
            teacher_of(logits_1V, self._teacher_top_k, lens_1)
        if self._is_float8:
            pack_rows(torch.zeros(1, aux_width, dtype=dtype, device=place))

    def take(
        self, aux_NA: torch.Tensor, logits_MV: torch.Tensor, accept_lens_B: torch.Tensor | None = None
    ) -> "PassRows | None":
        """On the stream of the pass, before anything overwrites what it made. None where the ring is full.

        accept_lens: of a verify step; the rejected rows' teacher is not defined.
        Shapes: aux_NA [N, A*D], logits_MV [M, V], accept_lens_B [B] on the device.
        """
        slot = self._ring.take(self._num_bytes(aux_NA, logits_MV))  # first: a full ring costs the device nothing
        if slot is None:
            return None
        aux, *scales = pack_rows(aux_NA) if self._is_float8 else (aux_NA.clone(),)
        ours = [aux, *teacher_of(logits_MV, self._teacher_top_k, accept_lens_B).tensors, *scales]
        on_host = slot.like(ours)
        return PassRows(on_host, slot, self._device.copy_aside(list(zip(on_host, ours, strict=True))))

    def _num_bytes(self, aux_NA: torch.Tensor, logits_MV: torch.Tensor) -> list[int]:
        """Of each tensor that `take` makes, in its order."""
        num_teachers, num_tokens = logits_MV.shape
        named = 4 * num_teachers * min(self._teacher_top_k, num_tokens)
        aux, scales = (aux_NA.numel(), [4 * len(aux_NA)]) if self._is_float8 else (aux_NA.nbytes, [])
        return [aux, named, named, 4 * num_teachers, *scales]


@dataclass(frozen=True)
class PassRows:
    """All rows of a pass on their way to the host: aux [N, A*D], ids, logits [M, k], lse [M], float8's scales [N]."""

    on_host: list[torch.Tensor]
    slot: Slot
    copied: Event

    def keep(self, rows: Sequence[int], teacher_rows: Sequence[int], guard: Callable[..., Any]) -> "KeptRows":
        return KeptRows(self, rows, teacher_rows, guard)


class KeptRows:
    """Those that a message takes: their headers at once, the frames when it is sent. guard: the fuse.

    Source of the order: wire.messages.Rows.
    """

    def __init__(
        self, of: PassRows, rows: Sequence[int], teacher_rows: Sequence[int], guard: Callable[..., Any]
    ) -> None:
        self._of = of
        self._guard = guard
        self._kept = [rows, *[teacher_rows] * 3, rows][: len(of.on_host)]
        self.headers = [
            FrameHeader(str(tensor.dtype).removeprefix("torch."), [len(kept), *tensor.shape[1:]])
            for tensor, kept in zip(of.on_host, self._kept, strict=True)
        ]
        self.num_bytes = sum(len(kept) * tensor[:1].nbytes for tensor, kept in zip(of.on_host, self._kept, strict=True))

    @property
    def are_here(self) -> bool:
        """So few, and copied already, that gathering them at once costs less than the sender's turns at the
        interpreter would."""
        return self.num_bytes <= INLINE_BYTES and self._of.copied.is_done()

    def __call__(self) -> list[np.ndarray] | None:
        """Once, on the sender's thread where they are not here: waits for the copy. None where that failed."""
        frames: list[np.ndarray] | None = self._guard(self._gather)
        return frames

    def _gather(self) -> list[np.ndarray]:
        self._of.copied.wait()
        frames = []
        for tensor, kept in zip(self._of.on_host, self._kept, strict=True):
            bits = tensor.view(_BITS.get(tensor.dtype, tensor.dtype))
            frames.append(bits.index_select(0, torch.tensor(kept, dtype=torch.int64)).numpy())  # without the GIL
        self._of.slot.release()
        return frames
