"""One run of `bench overhead`: a server of its own or a given one, the blocks, the swaps, table, JSON and plot."""

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from onlinespec.bench.client import Sampling
from onlinespec.bench.overhead import (
    Block,
    Load,
    Overhead,
    measured,
    run_blocks,
    run_swaps,
    summarise_overhead,
    swap_gaps,
    warm_up,
    whole_pairs,
)
from onlinespec.bench.overhead_gaps import Window
from onlinespec.bench.overhead_toggle import STATES, Toggle, toggling
from onlinespec.bench.provenance import commit
from onlinespec.bench.stream_results import Results
from onlinespec.bench.stream_serve import free_port, our_command, serving
from onlinespec.bench.suites import load_suite
from onlinespec.errors import BenchError, WireError
from onlinespec.launch import read_launch
from onlinespec.paths import RunPaths

KIND = "bench overhead"
_NUM_PROMPTS = 2000
"""then they come again"""


@dataclass(frozen=True)
class OverheadPlan:
    """What a user asked for. run_dir: of a running server; None starts one."""

    out: Path
    run_dir: Path | None
    target: Path
    draft: str
    suite: str
    num_pairs: int
    block_s: float
    num_swaps: int
    num_users: int
    max_tokens: int
    num_draft_steps: int = 3
    config_files: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


def run_overhead(plan: OverheadPlan, console: Console) -> bool:
    """Measure what the file does not hold yet, write, show; False where Ctrl-C or the server's death ended it early.

    What was measured is kept; the next run adds pairs of its own, since blocks of two runs do not pair.
    Raises: StartError where the server does not start; BenchError where it cannot be measured.
    """
    settings = {
        "suite": plan.suite,
        "num_users": plan.num_users,
        "max_tokens": plan.max_tokens,
        "block_s": plan.block_s,
        "num_pairs": plan.num_pairs,
        "draft": plan.draft if plan.run_dir is None else "the server's own",
        "overrides": list(plan.overrides),
        "flags": list(plan.flags),
    }
    results = Results(plan.out, KIND, settings)
    if results.more.get("is_whole"):
        console.print(f"{plan.out} is whole")
        return True
    with _server(plan, console) as run_dir, toggling(run_dir) as toggle:
        return _measure(plan, toggle, read_launch(run_dir).base_url, results, console)


@contextlib.contextmanager
def _server(plan: OverheadPlan, console: Console) -> Iterator[Path]:
    if plan.run_dir is not None:
        yield plan.run_dir
        return
    with tempfile.TemporaryDirectory(prefix="osb-") as root:
        paths, port = RunPaths(root), free_port()
        paths.create()
        log = plan.out.with_suffix(".log")
        console.print(f"starting a server; its log is {log}")
        sets = (paths.root, plan.num_draft_steps, plan.config_files, plan.overrides, plan.flags)
        with serving(our_command(plan.target, port, plan.draft, *sets), port, log, paths):
            yield paths.root


def _measure(plan: OverheadPlan, toggle: Toggle, base_url: str, results: Results, console: Console) -> bool:
    prompts = itertools.cycle(load_suite(plan.suite, _NUM_PROMPTS, 1))
    load = Load(base_url, prompts, Sampling(max_tokens=plan.max_tokens), plan.num_users)
    before = whole_pairs(msgspec.convert(results.rows, list[Block]))
    pairs = range(len(before) // len(STATES), plan.num_pairs)
    blocks: list[Block] = []
    swaps: tuple[list[Window], Window] | None = None
    has_ended = False
    load.start()
    try:
        with Progress(console=console) as bar:
            task = bar.add_task("blocks", total=len(STATES) * plan.num_pairs, completed=len(before))

            def on_block(block: Block) -> None:
                blocks.append(block)
                bar.advance(task)

            warm_up(toggle, load)
            run_blocks(toggle, load, pairs, plan.block_s, on_block)
            bar.update(task, description="swaps")
            swaps = run_swaps(toggle, load, plan.num_swaps) if plan.num_swaps >= 2 else None
        has_ended = True
    except KeyboardInterrupt:
        console.print("stopped; what was measured is kept")
    except (BenchError, WireError) as error:
        console.print(f"ended early: {error}; what was measured is kept")
    answers = load.stop()
    made = {"commit": commit()}
    new = whole_pairs(measured(blocks, answers))
    results.rows = results.rows[: len(before)] + [msgspec.to_builtins(block) | made for block in new]
    found = summarise_overhead([*before, *new], swap_gaps(answers, *swaps) if swaps else None)
    results.write({"is_whole": has_ended, "summary": msgspec.to_builtins(found)})
    console.print(table(found))
    plot([*before, *new], plan.out.with_suffix(".png"))
    console.print(f"written to {plan.out} and {plan.out.with_suffix('.png')}")
    return has_ended


def table(found: Overhead) -> Table:
    result = Table(title=f"overhead; ratios of paired blocks with t intervals of 95 %{_counts(found)}")
    for heading in ("", "pairs", "tokens/s", "99th percentile of gaps"):
        result.add_column(heading, justify="left" if not heading else "right")
    for ratio in found.ratios:
        pairs = str(ratio.tokens_per_s.num_values)
        result.add_row(f"{ratio.over} over {ratio.under}", pairs, str(ratio.tokens_per_s), str(ratio.gap_p99))
    if found.swaps and found.swaps["at"]["gaps"]:
        at, away = (found.swaps[where]["ms"] for where in ("at", "away"))
        longest = f"longest {at['longest']} ms at swaps, {away['longest']} ms away"
        result.add_row("gaps at swaps", str(found.swaps["windows"]), "", longest)
    return result


def _counts(found: Overhead) -> str:
    if found.bytes_per_row is None:
        return ""
    dropped = max((frac for frac in found.dropped_frac.values() if frac is not None), default=0.0)
    steps = f"{found.optimizer_steps_per_s:.2f} optimizer steps/s while training"
    return f"\n{found.bytes_per_row:.0f} bytes a row, at most {dropped:.2%} of rows dropped; {steps}"


def plot(blocks: list[Block], path: Path) -> None:
    """Tokens/s of every block, in order, by state."""
    figure, axes = plt.subplots(figsize=(9, 4), constrained_layout=True)
    for state in STATES:
        places = [i for i, block in enumerate(blocks) if block.state == state]
        axes.plot(places, [blocks[i].tokens_per_s for i in places], "o", label=state)
    axes.set(xlabel="block", ylabel="output tokens/s", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
