"""The tap: rows of committed tokens ride SGLang's auxiliary output from the forward pass to the commit.

B requests of the batch, N rows of a pass, A captured layers, D target width, V vocabulary, k teacher top-k.

On the device only what leaves it is made: top-k and logsumexp of the logits, a clone of the captured states
where CUDA graphs own them. SGLang copies them on its own stream; the commit says which rows are kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sglang.srt.managers.auxiliary_output import append_auxiliary_output

from onlinespec.plugin.requests import RequestBook, prefill_pass, verify_pass
from onlinespec.wire.frames import header_of
from onlinespec.wire.messages import Rows
from onlinespec.wire.sockets import SampleSender


@dataclass(frozen=True)
class Teacher:
    """Target logits of M rows: ids and logits [M, k], lse [M], at temperature 1."""

    ids_Mk: torch.Tensor
    logits_Mk: torch.Tensor
    lse_M: torch.Tensor

    def map(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> "Teacher":
        return Teacher(copy(self.ids_Mk), copy(self.logits_Mk), copy(self.lse_M))


def teacher_of(logits_MV: torch.Tensor, k: int) -> Teacher:
    """Top-k logits and logsumexp in float32. Shapes: logits_MV [M, V], left as it is."""
    logits = logits_MV.float()
    values, ids = torch.topk(logits, min(k, logits.shape[1]), dim=1)
    return Teacher(ids.to(torch.int32), values, torch.logsumexp(logits, dim=1))


@dataclass(frozen=True)
class Layout:
    """What the host knew when the pass was launched. width 0: a prefill with its prefix and extend lengths.
    drafted_by: see `verify_pass`, aligned with the batch."""

    width: int
    prefix_lens: Sequence[int] = ()
    extend_lens: Sequence[int] = ()
    drafted_by: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class DeviceRows:
    """All rows of one pass, on the device. Source: SGLang 0.5.23 managers/auxiliary_output.py DeviceAuxiliaryOutput."""

    tap: "Tap"
    layout: Layout
    aux_NA: torch.Tensor
    teacher: Teacher
    accept_lens_B: torch.Tensor | None

    def copy_to_host(self, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> "HostRows | NoRows":
        return self.tap.guard(self._copy, copy_tensor) or NoRows()

    def _copy(self, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> "HostRows":
        accept_lens = None if self.accept_lens_B is None else copy_tensor(self.accept_lens_B)
        return HostRows(self.tap, self.layout, copy_tensor(self.aux_NA), self.teacher.map(copy_tensor), accept_lens)


class NoRows:
    """Stands where a copy failed or the fuse is open."""

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Nothing was taken."""


@dataclass(frozen=True)
class HostRows:
    """The same on the host. Source: SGLang 0.5.23 managers/auxiliary_output.py HostAuxiliaryOutput."""

    tap: "Tap"
    layout: Layout
    aux_NA: torch.Tensor
    teacher: Teacher
    accept_lens_B: torch.Tensor | None

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Called by SGLang once the pass's tokens are committed, before they are streamed."""
        self.tap.guard(self._send, batch.reqs, commits, is_last=True)

    def _send(self, reqs: Sequence[Any], commits: Sequence[Any]) -> None:
        tap, layout = self.tap, self.layout
        if layout.width:
            assert self.accept_lens_B is not None
            kept = verify_pass(tap.book, reqs, commits, self.accept_lens_B.tolist(), layout.width, layout.drafted_by)
        else:
            kept, started = prefill_pass(tap.book, reqs, commits, layout.prefix_lens, layout.extend_lens)
            for message in started:
                tap.sender.offer(message)
        if kept.segments:
            arrays = self._gather(kept.rows, kept.teacher_rows)
            headers = [header_of(array, dtype) for array, dtype in arrays]
            tap.sender.offer(Rows(kept.segments, headers), [array for array, _ in arrays], len(kept.rows))
        for ended in tap.book.ended():
            tap.sender.offer(ended)

    def _gather(self, rows: list[int], teacher_rows: list[int]) -> list[tuple[np.ndarray, str | None]]:
        teacher = self.teacher.map(lambda tensor: tensor[teacher_rows])
        aux = self.aux_NA[rows]
        is_bfloat16 = aux.dtype == torch.bfloat16
        array = (aux.view(torch.uint16) if is_bfloat16 else aux).numpy()
        return [
            (array, "bfloat16" if is_bfloat16 else None),
            (teacher.ids_Mk.numpy(), None),
            (teacher.logits_Mk.numpy(), None),
            (teacher.lse_M.numpy(), None),
        ]


class Tap:
    """Takes rows out of forward passes; everything runs inside the fuse that `guard` is.

    `before` and `after` bracket `forward_batch_generation`; `before_sampler` reads prefill logits before
    the sampler overwrites them.
    """

    def __init__(
        self,
        sender: SampleSender,
        book: RequestBook,
        teacher_top_k: int,
        version: Callable[[], int],
        guard: Callable[..., Any],
    ):
        self.sender = sender
        self.book = book
        self.guard = guard
        self.is_enabled = True
        self._teacher_top_k = teacher_top_k
        self._version = version
        self._prefill_teacher: Teacher | None = None
        self._is_prefill = False

    def before(self, batch: Any) -> Layout | None:
        """Note what the pass will overwrite. None where there is nothing to take."""
        self._prefill_teacher = None
        self._is_prefill = False
        if not batch.reqs or batch.forward_mode.is_idle():
            return None
        states = [self.book.state_of(req) for req in batch.reqs]
        version = self._version()
        first_by = [state.drafted_by for state in states]
        for state in states:
            state.drafted_by = version
        if not self.is_enabled:
            return None
        if batch.forward_mode.is_extend():
            self._is_prefill = True
            return Layout(0, list(batch.prefix_lens), list(batch.extend_lens))
        return Layout(1, drafted_by=[(first, version) for first in first_by])

    def before_sampler(self, logits_output: Any) -> None:
        if self._is_prefill and self._prefill_teacher is None:
            self._prefill_teacher = teacher_of(logits_output.next_token_logits, self._teacher_top_k)

    def after(self, result: Any, layout: Layout) -> None:
        """Attach the pass's rows to its result."""
        output = result.logits_output
        aux = output.hidden_states
        teacher = self._prefill_teacher
        if layout.width:
            layout = Layout(int(result.speculative_num_draft_tokens), drafted_by=layout.drafted_by)
            teacher = teacher_of(output.next_token_logits, self._teacher_top_k)
        assert teacher is not None, "prefill logits never reached the sampler"
        if aux.is_cuda:
            aux = aux.clone()
        rows = DeviceRows(self, layout, aux, teacher, result.accept_lens if layout.width else None)
        output.auxiliary_device_output = append_auxiliary_output(output.auxiliary_device_output, rows)
