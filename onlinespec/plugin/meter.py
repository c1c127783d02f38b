"""What decode steps cost and bring: tokens, requests and wall time, by draft depth, by load and by block.

Tokens are those the commit made visible. The cost of a step is the time from one decode iteration of the
scheduler to the next, which is what a request waits for its next tokens, copies and bookkeeping included.
It is comparable only where nothing else ran in between: an interval with a prefill, an order of ours, a
weight update or an idle or paused look for requests in it is dropped, not estimated. Under overlap scheduling
the scheduler waits there for the step before, and what that one took is the interval's length. So it counts only where
that one was of the same kind, and was not the first of its kind either, before which weights may have been copied.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from onlinespec.plugin.commits import Commit
from onlinespec.plugin.switchback import Place
from onlinespec.wire.messages import BlockEnded, StartSwitchback


@dataclass(frozen=True)
class Turn:
    """The place of a decode step in a switchback, and who drafts it."""

    order: StartSwitchback
    place: Place
    version: int


@dataclass
class _Block:
    """Of a switchback, its first step left out."""

    num_steps: int = 0
    num_tokens: int = 0
    num_requests: int = 0
    num_timed_steps: int = 0
    num_timed_tokens: int = 0
    wall_ns: int = 0


@dataclass
class Step:
    """One decode iteration. num_tokens, num_requests: None until its commit. wall_ns: None unless comparable."""

    num_draft_steps: int
    load: int
    """batch size, rounded up to a power of two: what `gate.floor.load_bucket` calls one load"""
    turn: Turn | None
    block: _Block | None
    """None outside a switchback, and for the first step of a block"""
    began_ns: int
    num_before: int = 0
    """decode steps of the same kind right before it"""
    num_tokens: int | None = None
    num_requests: int | None = None
    wall_ns: int | None = None

    @property
    def kind(self) -> tuple[int, int, tuple[int, int] | None]:
        block = (self.turn.place.pair, self.turn.place.index) if self.turn else None
        return self.num_draft_steps, self.load, block


class Meter:
    """One per server, on rank 0's scheduler thread.

    counters: gets `decode_{steps,tokens,requests,us}_d<depth>_b<load>`, over timed steps since the start.
    say: takes each finished block. is_overlapped: the scheduler launches a step before it has read the one before.
    """

    def __init__(
        self,
        counters: Counter[str],
        say: Callable[[BlockEnded], Any],
        is_overlapped: bool,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
    ):
        self._counters = counters
        self._say = say
        self._num_before_settled = 2 if is_overlapped else 0
        self._clock_ns = clock_ns
        self._last: Step | None = None
        self._num_looks = 0
        self._block = _Block()

    def looked(self) -> None:
        """The scheduler looked for requests; twice between two decode steps means that it was idle or paused."""
        self._num_looks += 1
        if self._num_looks > 1:
            self.interrupt()

    def interrupt(self) -> None:
        """Something else than a decode step ran."""
        self._last = None

    def begin(self, num_draft_steps: int, num_requests: int, turn: Turn | None) -> Step:
        """A decode step is about to be launched."""
        now_ns, last = self._clock_ns(), self._last
        self._num_looks = 0
        if turn is not None and turn.place.step == 0:
            self._block = _Block()
        block = self._block if turn is not None and turn.place.step else None
        load = 1 << (num_requests - 1).bit_length()
        step = Step(num_draft_steps, load, turn, block, now_ns)
        if last is not None and last.kind == step.kind:
            step.num_before = last.num_before + 1
            if last.num_before >= self._num_before_settled:
                last.wall_ns = now_ns - last.began_ns
                self._settle(last)
        self._last = step
        return step

    def committed(self, step: Step, commits: Sequence[Commit | None]) -> None:
        """commits: of each request, None without tokens."""
        tokens = [len(commit.token_ids) for commit in commits if commit is not None]
        step.num_tokens, step.num_requests = sum(tokens), len(tokens)
        block, turn = step.block, step.turn
        if block is not None:
            block.num_steps += 1
            block.num_tokens += step.num_tokens
            block.num_requests += step.num_requests
        self._settle(step)
        if block is not None and turn is not None and turn.place.is_last:
            self._say(_ended(block, turn, step.num_draft_steps))

    def _settle(self, step: Step) -> None:
        """Count a step once both its time and its tokens are known; they come in either order."""
        if step.wall_ns is None or step.num_tokens is None or step.num_requests is None:
            return
        key = f"d{step.num_draft_steps}_b{step.load}"
        self._counters[f"decode_steps_{key}"] += 1
        self._counters[f"decode_tokens_{key}"] += step.num_tokens
        self._counters[f"decode_requests_{key}"] += step.num_requests
        self._counters[f"decode_us_{key}"] += step.wall_ns // 1000
        if step.block is not None:
            step.block.num_timed_steps += 1
            step.block.num_timed_tokens += step.num_tokens
            step.block.wall_ns += step.wall_ns


def _ended(block: _Block, turn: Turn, num_draft_steps: int) -> BlockEnded:
    return BlockEnded(
        candidate=turn.order.version,
        seed=turn.order.seed,
        pair=turn.place.pair,
        index=turn.place.index,
        version=turn.version,
        num_draft_steps=num_draft_steps,
        num_steps=block.num_steps,
        num_tokens=block.num_tokens,
        num_requests=block.num_requests,
        num_timed_steps=block.num_timed_steps,
        num_timed_tokens=block.num_timed_tokens,
        wall_us=block.wall_ns // 1000,
    )


@dataclass(frozen=True)
class StepRider:
    """Carries a step to its commit; see `commits.Rider`. guard: the fuse."""

    meter: Meter
    step: Step
    guard: Callable[..., Any]

    def committed(
        self, _reqs: Sequence[Any], commits: Sequence[Commit | None], _accept_lens_B: torch.Tensor | None
    ) -> None:
        self.guard(self.meter.committed, self.step, commits)
