"""The rows of a replay, one after another or several at once, each then in a worker process of its own.

A row depends on its arm, order and seed alone, so nothing changes in it where others are played beside it. A worker
reads the recordings for itself and the oracles from their cache.
"""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import torch

from onlinespec.bench.arms import Arm
from onlinespec.bench.replay import ReplayRow, World, play
from onlinespec.bench.replay_orders import schedule
from onlinespec.bench.replay_world import Pools, Progress, build_world, read_pools
from onlinespec.errors import BenchError
from onlinespec.resolve import load_config

Key = tuple[str, int, Arm]
"""order, seed and arm of a row"""
_POLL_S = 0.5


@dataclass(frozen=True)
class ReplayPlan:
    """What a user asked for. recordings: as `replay_world.domain_and_path`. draft: as `replay_world.build_world`."""

    recordings: tuple[str, ...]
    target: Path
    out: Path
    draft: str
    arms: tuple[str, ...]
    """as `arms.parse_arm` reads them; empty for all"""
    orders: tuple[str, ...]
    seeds: tuple[int, ...]
    tokens_per_domain: int
    num_draft_steps: int = 3
    oracle_passes: int = 3
    config_files: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = ()
    jobs: int = 1
    """rows played at once"""

    def world(self, pools: Pools, on_step: Progress) -> World:
        """Raises: CheckpointError."""
        cache = self.out.with_suffix(".oracles")
        return build_world(pools, self.target, self.draft, self.num_draft_steps, self.oracle_passes, cache, on_step)


@dataclass(frozen=True)
class Player:
    """Plays rows. on_advance: told of each request, as the share of its row."""

    plan: ReplayPlan
    pools: Pools
    world: World
    on_advance: Callable[[float], None]

    def row(self, key: Key) -> ReplayRow:
        order, seed, arm = key
        config = load_config(self.plan.config_files, [*self.plan.overrides, *arm.overrides, f"trainer.seed={seed}"])
        stream = schedule(order, self.pools.train, self.plan.tokens_per_domain, self.pools.tokens_per_s, seed)
        return play(arm, order, seed, stream, config, self.world, lambda: self.on_advance(1 / len(stream)))


def build_player(plan: ReplayPlan, on_advance: Callable[[float], None]) -> Player:
    """Raises: BenchError, RecordError, CheckpointError."""
    pools = read_pools(plan.recordings, plan.target)
    return Player(plan, pools, plan.world(pools, lambda *_: None), on_advance)


_player: Player | None = None
"""of this worker process"""


def _begin(plan: ReplayPlan, num_played: "Synchronized[float]") -> None:
    """A worker's start. Ctrl-C is for the process that waits for it."""
    global _player
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)

    def on_advance(share: float) -> None:
        with num_played.get_lock():
            num_played.value += share

    _player = build_player(plan, on_advance)


def _row(key: Key) -> ReplayRow:
    assert _player is not None
    return _player.row(key)


def rows_at_once(
    plan: ReplayPlan, keys: Sequence[Key], on_played: Callable[[float], None]
) -> Generator[tuple[Key, ReplayRow], None, None]:
    """Rows as they end, `plan.jobs` at once; the oracles are cached already. on_played: told how many rows were played.

    Raises: BenchError where a worker died.
    """
    context = multiprocessing.get_context("spawn")
    num_played = context.Value("d", 0.0)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(plan.jobs, context, _begin, (plan, num_played))
    try:
        pending = {pool.submit(_row, key): key for key in keys}
        while pending:
            done, _ = wait(pending, _POLL_S, FIRST_COMPLETED)
            on_played(num_played.value)
            for future in done:
                yield pending.pop(future), future.result()
    except BrokenProcessPool as error:
        raise BenchError(
            f"one of {plan.jobs} worker processes died, for want of memory perhaps; what was played is in {plan.out}, "
            "and the same command with a smaller --jobs goes on"
        ) from error
    finally:
        _end(pool, set(multiprocessing.active_children()) - before)


def _end(pool: ProcessPoolExecutor, workers: set[BaseProcess]) -> None:
    """At once, whatever they are at."""
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        with contextlib.suppress(ValueError):  # closed by the pool meanwhile
            worker.terminate()
