"""`onlinespec bench stream --replay`: the arms, orders and seeds that the result still lacks, row by row."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from onlinespec.bench.arms import REPLAY_ARMS, Arm, parse_arm
from onlinespec.bench.replay import ReplayRow, World, play
from onlinespec.bench.replay_orders import ORDERS, schedule
from onlinespec.bench.replay_plot import plot
from onlinespec.bench.replay_report import summarise_rows, table
from onlinespec.bench.replay_world import Pools, build_world, read_pools
from onlinespec.bench.stream_results import Results
from onlinespec.errors import BenchError
from onlinespec.resolve import load_config

KIND = "bench stream, replay"


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


def run_replay(plan: ReplayPlan, console: Console) -> bool:
    """Play what is missing, write the result after every row, then the table and the plot; False where Ctrl-C ended it.

    Raises: BenchError, RecordError, CheckpointError, ConfigError.
    """
    torch.set_num_threads(1)
    arms = [parse_arm(text) for text in plan.arms or REPLAY_ARMS]
    if unfit := [arm.name for arm in arms if arm.is_adaptive]:
        raise BenchError(
            f"arm {unfit[0]}: its draft depth follows the server's load, which a replay has not; leave it out"
        )
    if unknown := [order for order in plan.orders if order not in ORDERS]:
        raise BenchError(f"order {unknown[0]!r}: no such order; wanted one of {', '.join(ORDERS)}")
    pools = read_pools(plan.recordings, plan.target)
    results = Results(plan.out, KIND, _settings(plan, pools))
    missing = [
        (order, seed, arm)
        for order in plan.orders
        for seed in plan.seeds
        for arm in arms
        if results.find(arm=arm.name, order=order, seed=seed) is None
    ]
    has_ended = True
    if missing:
        try:
            _play_all(plan, pools, missing, results, console)
        except KeyboardInterrupt:
            console.print(f"stopped; {len(results.rows)} rows are in {plan.out}, and the same command goes on")
            has_ended = False
    _show(results, console)
    return has_ended


def _settings(plan: ReplayPlan, pools: Pools) -> dict[str, Any]:
    """All that decides what a row says, the row's own key aside."""
    return {
        "recordings": pools.digests,
        "draft": plan.draft,
        "tokens_per_domain": plan.tokens_per_domain,
        "num_draft_steps": plan.num_draft_steps,
        "oracle_passes": plan.oracle_passes,
        "config": msgspec.to_builtins(load_config(plan.config_files, plan.overrides)),
    }


def _play_all(
    plan: ReplayPlan, pools: Pools, missing: Sequence[tuple[str, int, Arm]], results: Results, console: Console
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("oracles", total=None)

        def on_step(domain: str, done: int, steps: int) -> None:
            bar.update(task, description=f"oracle of {domain}", completed=done, total=steps)

        cache = plan.out.with_suffix(".oracles")
        world = build_world(pools, plan.target, plan.draft, plan.num_draft_steps, plan.oracle_passes, cache, on_step)
        lengths = ", ".join(f"{domain} {length:.2f}" for domain, length in world.oracle.items())
        console.print(f"oracles, by accept length: {lengths}; their drafts are in {cache}")
        for number, (order, seed, arm) in enumerate(missing, 1):
            bar.reset(task, description=f"{number} of {len(missing)}: {arm.name}, {order}, seed {seed}")
            row = _play(plan, pools, world, (order, seed, arm), bar, task)
            results.put(row, arm=arm.name, order=order, seed=seed)


def _play(
    plan: ReplayPlan, pools: Pools, world: World, key: tuple[str, int, Arm], bar: Progress, task: Any
) -> ReplayRow:
    order, seed, arm = key
    config = load_config(plan.config_files, [*plan.overrides, *arm.overrides, f"trainer.seed={seed}"])
    stream = schedule(order, pools.train, plan.tokens_per_domain, pools.tokens_per_s, seed)
    bar.update(task, total=len(stream), completed=0)
    began_s = time.monotonic()
    row = play(arm, order, seed, stream, config, world, lambda: bar.advance(task))
    final = ", ".join(f"{domain} {result.final:.2f}" for domain, result in row.domains.items())
    told = f"{arm.name}, {order}, seed {seed}: accept length at the end {final}; {row.num_swaps} swaps"
    bar.console.print(f"{told}, {time.monotonic() - began_s:.0f} s")
    return row


def _show(results: Results, console: Console) -> None:
    rows = [msgspec.convert(row, ReplayRow, strict=False) for row in results.rows]
    if not rows:
        return
    lines = summarise_rows(rows)
    results.write({"summary": msgspec.to_builtins(lines)})
    console.print(table(lines))
    plot(rows, results.path.with_suffix(".png"))
    console.print(f"written to {results.path} and {results.path.with_suffix('.png')}")
