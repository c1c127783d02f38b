"""The tap: rows of committed tokens, from the forward pass to the sender.

B requests of the batch, N rows of a pass, A captured layers, D target width, V vocabulary.

It takes rows where SGLang has just made them: those of a prefill before the sampler overwrites its logits, those
of a verify step before the draft runs again, whose CUDA graphs share their memory with the target's. The commit
says which are kept (`commits`); what waits and copies is in `rows`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from onlinespec.plugin.commits import Carrier, Commit
from onlinespec.plugin.requests import RequestBook, prefill_pass, verify_pass
from onlinespec.plugin.rows import PassRows, RowCopier
from onlinespec.wire.messages import Rows
from onlinespec.wire.sockets import SampleSender


@dataclass(frozen=True)
class Layout:
    """What the host knew when the pass was launched. drafted_by: see `verify_pass`, aligned with the batch; None for
    a prefill, which has its prefix and extend lengths. is_wanted: some request of it is captured."""

    is_wanted: bool
    drafted_by: Sequence[tuple[int, int]] | None = None
    prefix_lens: Sequence[int] = ()
    extend_lens: Sequence[int] = ()


@dataclass(frozen=True)
class TapRider:
    """Waits for the commit. width: rows per request of a verify step. rows: None where the ring was full."""

    tap: "Tap"
    layout: Layout
    width: int
    rows: PassRows | None

    def committed(
        self, reqs: Sequence[Any], commits: Sequence[Commit | None], accept_lens_B: torch.Tensor | None
    ) -> None:
        self.tap.guard(self._send, reqs, commits, accept_lens_B, is_last=True)

    def _send(self, reqs: Sequence[Any], commits: Sequence[Commit | None], accept_lens_B: torch.Tensor | None) -> None:
        tap, layout = self.tap, self.layout
        if layout.drafted_by is None:
            kept, started = prefill_pass(tap.book, reqs, commits, layout.prefix_lens, layout.extend_lens)
            for message in started:
                tap.sender.offer(message)
        else:
            assert accept_lens_B is not None
            assert accept_lens_B.is_cpu, "read from the device, they would stall the scheduler"
            kept = verify_pass(tap.book, reqs, commits, accept_lens_B.tolist(), self.width, layout.drafted_by)
        if kept.segments and self.rows is None:
            tap.sender.counters["ring_full"] += 1
            tap.sender.drop(len(kept.rows), 0)
        elif kept.segments and self.rows is not None:
            rows = self.rows.keep(kept.rows, kept.teacher_rows, tap.guard)
            frames = rows() if rows.are_here else rows
            if frames is None:
                tap.sender.drop(len(kept.rows), rows.num_bytes)
            else:
                tap.sender.offer(Rows(kept.segments, rows.headers), frames, len(kept.rows))
        for ended in tap.book.ended():
            tap.sender.offer(ended)


class Tap:
    """Takes rows out of forward passes; everything runs inside the fuse that `guard` is.

    `before` and `after` bracket `forward_batch_generation`; in between, `before_sampler` of a prefill or
    `after_verify` of a decode step take the rows.
    """

    def __init__(
        self,
        sender: SampleSender,
        book: RequestBook,
        carrier: Carrier,
        copier: RowCopier,
        version: Callable[[], int],
        guard: Callable[..., Any],
    ):
        self.sender = sender
        self.book = book
        self.guard = guard
        self.is_enabled = True
        self._carrier = carrier
        self._copier = copier
        self._version = version
        self._layout: Layout | None = None
        """of the pass under way"""
        self._is_taken = False
        self._rows: PassRows | None = None

    def before(self, batch: Any) -> Layout | None:
        """Note what the pass will overwrite. None where there is nothing to take."""
        self._layout, self._is_taken, self._rows = None, False, None
        if not batch.reqs or batch.forward_mode.is_idle():
            return None
        states = [self.book.state_of(req) for req in batch.reqs]
        version = self._version()
        first_by = [state.drafted_by for state in states]
        for state in states:
            state.drafted_by = version
        if not self.is_enabled:
            return None
        is_wanted = any(state.is_captured for state in states)
        if batch.forward_mode.is_extend():
            self._layout = Layout(is_wanted, None, list(batch.prefix_lens), list(batch.extend_lens))
        else:
            self._layout = Layout(is_wanted, [(first, version) for first in first_by])
        return self._layout

    def before_sampler(self, logits_output: Any) -> None:
        """Also called for other samplers than a prefill's, and then not ours to read."""
        if self._layout is not None and self._layout.drafted_by is None:
            self._take(logits_output)

    def after_verify(self, result: Any) -> None:
        if self._layout is not None and self._layout.drafted_by is not None:
            self._take(result.logits_output, result.accept_lens)

    def _take(self, output: Any, accept_lens_B: torch.Tensor | None = None) -> None:
        """The first in a pass is the target's."""
        assert self._layout is not None
        if not self._is_taken and self._layout.is_wanted:
            self._rows = self._copier.take(output.hidden_states, output.next_token_logits, accept_lens_B)
        self._is_taken = True

    def after(self, result: Any, layout: Layout) -> None:
        """Attach the pass's rows to its result."""
        rows, self._layout, self._rows = self._rows, None, None
        assert self._is_taken, "the pass's logits reached neither the sampler nor the end of a verify step"
        width = 0 if layout.drafted_by is None else int(result.speculative_num_draft_tokens)
        self._carrier.attach(result, TapRider(self, layout, width, rows))
