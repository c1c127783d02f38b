"""`onlinespec bench stream --replay`: the arms, orders and seeds that the result still lacks, row by row."""

import contextlib
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from onlinespec.bench.arms import REPLAY_ARMS, parse_arm
from onlinespec.bench.replay import ReplayRow
from onlinespec.bench.replay_jobs import Key, Player, ReplayPlan, rows_at_once
from onlinespec.bench.replay_orders import ORDERS
from onlinespec.bench.replay_plot import plot
from onlinespec.bench.replay_report import summarise_rows, table
from onlinespec.bench.replay_world import Pools, read_pools
from onlinespec.bench.stream_results import Results
from onlinespec.errors import BenchError
from onlinespec.resolve import load_config

KIND = "bench stream, replay"


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
    wanted = [(order, seed, arm) for order in plan.orders for seed in plan.seeds for arm in arms]
    missing = [key for key in wanted if results.find(**_named(key)) is None]
    has_ended = True
    if missing:
        try:
            _play_all(plan, pools, missing, results, console)
        except KeyboardInterrupt:
            console.print(f"stopped; {len(results.rows)} rows are in {plan.out}, and the same command goes on")
            has_ended = False
    places = {tuple(_named(key).values()): place for place, key in enumerate(wanted)}
    results.rows.sort(key=lambda row: places.get((row["order"], row["seed"], row["arm"]), -1))
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


def _named(key: Key) -> dict[str, Any]:
    """What a row is found by."""
    order, seed, arm = key
    return {"order": order, "seed": seed, "arm": arm.name}


def _play_all(plan: ReplayPlan, pools: Pools, missing: Sequence[Key], results: Results, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.1f} of {task.total:.0f}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("oracles", total=1)

        def on_step(domain: str, done: int, steps: int) -> None:
            bar.update(task, description=f"oracle of {domain}, steps", completed=done, total=steps)

        world = plan.world(pools, on_step)
        lengths = ", ".join(f"{domain} {length:.2f}" for domain, length in world.oracle.items())
        console.print(f"oracles, by accept length: {lengths}; their drafts are in {plan.out.with_suffix('.oracles')}")
        bar.reset(task, description=f"rows, {plan.jobs} at once", total=len(missing))
        if plan.jobs > 1:
            found = rows_at_once(plan, missing, lambda played: bar.update(task, completed=played))
        else:
            player = Player(plan, pools, world, lambda share: bar.advance(task, share))
            found = ((key, player.row(key)) for key in missing)
        with contextlib.closing(found):
            for key, row in found:
                results.put(row, **_named(key))
                bar.console.print(_told(row))


def _told(row: ReplayRow) -> str:
    final = ", ".join(f"{domain} {result.final:.2f}" for domain, result in row.domains.items())
    return f"{row.arm}, {row.order}, seed {row.seed}: accept length at the end {final}; {row.num_swaps} swaps"


def _show(results: Results, console: Console) -> None:
    rows = [msgspec.convert(row, ReplayRow, strict=False) for row in results.rows]
    if not rows:
        return
    lines = summarise_rows(rows)
    results.write({"summary": msgspec.to_builtins(lines)})
    console.print(table(lines))
    plot(rows, results.path.with_suffix(".png"))
    console.print(f"written to {results.path} and {results.path.with_suffix('.png')}")
