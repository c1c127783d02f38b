"""`onlinespec bench overhead`: what the tap, and training beside it, cost the server that carries them.

One server under a steady load of its own; its states (`overhead_toggle`) follow one another in blocks, off tap
training training tap off, and so on: ABBA with a third letter. So each pair of neighbouring states is compared within
seconds of each other, and what drifts over minutes is in both orders equally often. A ratio is over pairs of blocks,
with the t interval of `interval.ratio_interval`.

A block has the tokens of the chunks that came in it. The first `SETTLE_S` after each switch belong to no block.
"""

import asyncio
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from onlinespec.bench.accept import drive
from onlinespec.bench.client import Answer, Prompt, Sampling
from onlinespec.bench.interval import Interval, ratio_interval
from onlinespec.bench.overhead_gaps import Window, compare, gaps_of
from onlinespec.bench.overhead_toggle import STATES, State, Toggle
from onlinespec.bench.summary import percentile
from onlinespec.draft.header import digest
from onlinespec.errors import BenchError
from onlinespec.wire.messages import Swap

SETTLE_S = 1.0
WARM_UP_STEPS = 8
"""optimizer steps that the sidecar must have made before the first block: it trains then"""
_WARM_UP_S = 180.0
_TWIN = 1_000_000
"""added to a version's number: the same weights, swapped in as another version"""


class Block(msgspec.Struct, frozen=True):
    """One block. Times of the monotonic clock; counters are what the server, and the sidecar, counted in it."""

    state: State
    pair: int
    """half of an ABBA it belongs to: one block of each state"""
    began_s: float
    ended_s: float
    num_rows: int
    """sent or queued"""
    num_bytes: int
    num_dropped_rows: int
    optimizer_steps: int
    tokens_per_s: float = 0.0
    gap_p99_s: float | None = None
    num_gaps: int = 0


class Ratio(msgspec.Struct, frozen=True):
    """One state over another, over pairs of blocks."""

    over: State
    under: State
    tokens_per_s: Interval
    gap_p99: Interval
    """99th percentile of the gaps between two chunks of a stream"""


class Overhead(msgspec.Struct, frozen=True):
    """What the blocks come to. None where nothing was counted."""

    ratios: list[Ratio]
    bytes_per_row: float | None
    """of what was sent; a row is a committed token's, or a prompt's"""
    dropped_frac: dict[str, float | None]
    """share of rows dropped for want of room, by state"""
    optimizer_steps_per_s: float
    """in the blocks with training"""
    swaps: dict[str, Any] | None
    """gaps at swaps against those away from them, see `overhead_gaps.compare`; None where none were made"""


@dataclass
class Load:
    """A closed loop of users in a thread, each asking again at once, until `stop`; answers as they end."""

    base_url: str
    prompts: Iterable[Prompt]
    sampling: Sampling
    num_users: int

    def __post_init__(self) -> None:
        self.answers: list[Answer] = []
        self.failure: Exception | None = None
        """what ended it early"""
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> list[Answer]:
        """Let requests in flight end; the good answers."""
        self._is_stopping.set()
        self._thread.join(120)
        return [answer for answer in self.answers if not answer.error]

    def check(self) -> None:
        """Raises: BenchError where the server no longer answers."""
        if not self._thread.is_alive() and not self._is_stopping.is_set():
            last = self.answers[-1].error if self.answers else "nothing was ever answered"
            raise BenchError(f"{self.base_url} no longer answers: {self.failure or last}")

    def _run(self) -> None:
        def wanted(_prompt: Prompt) -> bool:
            has_failed = bool(self.answers) and bool(self.answers[-1].error)
            return not self._is_stopping.is_set() and not has_failed

        prompts = itertools.takewhile(wanted, self.prompts)
        try:
            asyncio.run(drive(self.base_url, prompts, self.sampling, self.num_users, self.answers.append))
        except BenchError as error:
            self.failure = error


def block_order(pairs: Iterable[int]) -> Iterator[tuple[int, State]]:
    """(pair, state) of every block: each pair has the states in the opposite order of the one before it."""
    for pair in pairs:
        yield from ((pair, state) for state in (STATES if pair % 2 == 0 else STATES[::-1]))


def run_blocks(
    toggle: Toggle, load: Load, pairs: Iterable[int], block_s: float, on_block: Callable[[Block], None]
) -> None:
    """Toggle and count; what was measured so far is with `on_block`. Raises: BenchError, WireError: the server died."""
    for pair, state in block_order(pairs):
        toggle.set(state)
        time.sleep(SETTLE_S)
        before, steps, began_s = toggle.status().counters, toggle.trainer_steps(), time.monotonic()
        time.sleep(block_s)
        load.check()
        ended_s, after = time.monotonic(), toggle.status().counters
        change = {name: after.get(name, 0) - before.get(name, 0) for name in ("rows", "bytes", "dropped_rows")}
        counted = (change["rows"], change["bytes"], change["dropped_rows"])
        on_block(Block(state, pair, began_s, ended_s, *counted, toggle.trainer_steps() - steps))


def warm_up(toggle: Toggle, load: Load) -> None:
    """Until the sidecar trains. Raises: BenchError where it does not, WireError."""
    toggle.set("training")
    deadline_s = time.monotonic() + _WARM_UP_S
    while toggle.trainer_steps() < WARM_UP_STEPS:
        load.check()
        if time.monotonic() > deadline_s:
            raise BenchError(
                f"the sidecar made {toggle.trainer_steps()} optimizer steps in {_WARM_UP_S:.0f} s of traffic, wanted "
                f"{WARM_UP_STEPS}; is trainer.enabled true, and does its server capture?"
            )
        time.sleep(0.5)


def run_swaps(toggle: Toggle, load: Load, num_swaps: int) -> tuple[list[Window], Window]:
    """Swap the draft in service for its own weights, to and fro, one to two seconds apart; the tap is on.

    The same bytes are staged, checked and copied as at any swap, and no accept length changes. Windows from the order
    to its answer, and the span they lie in. Raises: BenchError where the server refuses.
    """
    toggle.set("tap")
    version, rng = toggle.status().version, random.Random(1)
    path = toggle.paths.version(version)
    orders = [Swap(number, str(path), digest(path)) for number in (version + _TWIN, version)]
    began_s, windows = time.monotonic(), []
    for order in orders * (num_swaps // 2):
        time.sleep(rng.uniform(1.0, 2.0))
        load.check()
        sent_s = time.monotonic()
        ack = toggle.control.acknowledged(order)
        if not ack.is_ok:
            raise BenchError(f"the server refused to swap version {version} for itself: {ack.message}")
        windows.append((sent_s, time.monotonic()))
    time.sleep(1.0)
    return windows, (began_s, time.monotonic())


def measured(blocks: Sequence[Block], answers: Sequence[Answer]) -> list[Block]:
    """The blocks with their tokens/s and gaps, from the answers' chunks."""
    chunks = [chunk for answer in answers for chunk in chunks_of(answer)]
    gaps = [gap for answer in answers for gap in answer.gaps_s]
    result = []
    for block in blocks:
        tokens = sum(tokens for chunk_s, tokens in chunks if block.began_s <= chunk_s < block.ended_s)
        own = [
            length_s for ended_s, length_s in gaps if block.began_s <= ended_s - length_s and ended_s < block.ended_s
        ]
        found = {"tokens_per_s": tokens / (block.ended_s - block.began_s), "num_gaps": len(own)}
        result.append(msgspec.structs.replace(block, **found, gap_p99_s=percentile(own, 99)))
    return result


def whole_pairs(blocks: Sequence[Block]) -> list[Block]:
    """Those of pairs that have a block of every state."""
    counts = Counter(block.pair for block in blocks)
    return [block for block in blocks if counts[block.pair] == len(STATES)]


def chunks_of(answer: Answer) -> list[tuple[float, float]]:
    """(when it came, tokens that came with it) of each chunk; spread evenly where the server did not count them."""
    if len(answer.chunk_tokens) != len(answer.chunk_s):
        return [(chunk_s, answer.num_output_tokens / len(answer.chunk_s)) for chunk_s in answer.chunk_s]
    counts = [after - before for before, after in itertools.pairwise([0, *answer.chunk_tokens])]
    return list(zip(answer.chunk_s, counts, strict=True))


def summarise_overhead(blocks: Sequence[Block], swaps: dict[str, Any] | None) -> Overhead:
    """Pairs of which a block had no traffic, or is missing, are left out."""
    training_s = sum(block.ended_s - block.began_s for block in blocks if block.state == "training")
    num_rows = sum(block.num_rows for block in blocks)
    found = [ratio_of(blocks, over, under) for under, over in itertools.combinations(STATES, 2)]
    return Overhead(
        ratios=[ratio for ratio in found if ratio is not None],
        bytes_per_row=sum(block.num_bytes for block in blocks) / num_rows if num_rows else None,
        dropped_frac={state: _dropped_frac([b for b in blocks if b.state == state]) for state in STATES},
        optimizer_steps_per_s=sum(b.optimizer_steps for b in blocks if b.state == "training") / max(training_s, 1e-9),
        swaps=swaps,
    )


def ratio_of(blocks: Sequence[Block], over: State, under: State) -> Ratio | None:
    """None where no pair has both."""
    whole = {(block.pair, block.state): block for block in blocks if block.tokens_per_s and block.gap_p99_s}
    pairs = [
        (whole[pair, over], whole[pair, under]) for pair, state in whole if state == over and (pair, under) in whole
    ]
    tokens = ratio_interval([a.tokens_per_s for a, _ in pairs], [b.tokens_per_s for _, b in pairs])
    gaps = ratio_interval([a.gap_p99_s or 0.0 for a, _ in pairs], [b.gap_p99_s or 0.0 for _, b in pairs])
    return Ratio(over, under, tokens, gaps) if tokens is not None and gaps is not None else None


def _dropped_frac(blocks: Sequence[Block]) -> float | None:
    dropped = sum(block.num_dropped_rows for block in blocks)
    taken = dropped + sum(block.num_rows for block in blocks)
    return dropped / taken if taken else None


def swap_gaps(answers: Sequence[Answer], windows: Sequence[Window], span: Window) -> dict[str, Any] | None:
    """None where no gap was seen."""
    gaps = gaps_of([answer.chunk_s for answer in answers], span)
    return compare(gaps, windows, span) if len(gaps) else None
