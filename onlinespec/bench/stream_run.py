"""One run of the live stream: arm after arm, each with a server of its own; what an arm did is written when it ends."""

import asyncio
import contextlib
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from onlinespec.bench.accept import drive
from onlinespec.bench.arms import LIVE_ARMS, Arm, parse_arm
from onlinespec.bench.client import Answer, Prompt, Sampling
from onlinespec.bench.stream import LivePhase, LiveRow, phase_of, summarise_live, table
from onlinespec.bench.stream_results import Results
from onlinespec.bench.stream_serve import Server, free_port, our_command, serving, stock_command
from onlinespec.bench.suites import load_suite
from onlinespec.draft.checkpoint import write_draft
from onlinespec.draft.start import is_fresh, read_start
from onlinespec.errors import BenchError, OnlinespecError
from onlinespec.paths import RunPaths
from onlinespec.resolve import load_config
from onlinespec.wire.messages import GetStatus, Status
from onlinespec.wire.sockets import ControlClient

KIND = "bench stream, live"
_WARM_UP_SEED = 990_017
_WARM_UP_REQUESTS = 8


@dataclass(frozen=True)
class LivePlan:
    """What a user asked for. suites: one per phase, as for `bench accept`. flags: SGLang's, for every arm."""

    out: Path
    target: Path
    draft: str
    arms: tuple[str, ...]
    """as `arms.parse_arm` reads them; empty for all"""
    suites: tuple[str, ...]
    num_requests: int
    """of each phase"""
    num_users: int
    max_tokens: int
    seed: int
    window_requests: int = 20
    num_draft_steps: int = 3
    config_files: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def sampling(self) -> Sampling:
        return Sampling(max_tokens=self.max_tokens)


def run_live(plan: LivePlan, console: Console) -> bool:
    """Play the arms that are not complete yet; False where one failed or Ctrl-C ended it, what came being kept.

    A server that does not start or dies ends its arm alone. Raises: BenchError where an arm or a suite is not one.
    """
    arms = [parse_arm(text) for text in plan.arms or LIVE_ARMS]
    phases = [(suite, load_suite(suite, plan.num_requests, plan.seed)) for suite in plan.suites]
    if few := [suite for suite, prompts in phases if len(prompts) < 2 * plan.window_requests]:
        raise BenchError(f"suite {few[0]}: fewer prompts than two windows of {plan.window_requests}; lower --window")
    results = Results(plan.out, KIND, _settings(plan))
    with contextlib.suppress(KeyboardInterrupt):
        for arm in arms:
            found = results.find(arm=arm.name)
            if found is None or not found["is_complete"]:
                _play_arm(plan, arm, phases, results, console)
    return _show(results, arms, console)


def _settings(plan: LivePlan) -> dict[str, Any]:
    return {
        "target": plan.target.name,
        "draft": plan.draft,
        "suites": list(plan.suites),
        "num_requests": plan.num_requests,
        "num_users": plan.num_users,
        "max_tokens": plan.max_tokens,
        "seed": plan.seed,
        "window_requests": plan.window_requests,
        "num_draft_steps": plan.num_draft_steps,
        "flags": list(plan.flags),
        "config": msgspec.to_builtins(load_config(plan.config_files, plan.overrides)),
    }


def _play_arm(
    plan: LivePlan, arm: Arm, phases: Sequence[tuple[str, list[Prompt]]], results: Results, console: Console
) -> None:
    """One arm from its server's start to its end. A row is written whatever ends it; KeyboardInterrupt goes on."""
    played: list[LivePhase] = []
    num_swaps, error = 0, "stopped by Ctrl-C"
    answers: list[Answer] = []
    name = ""
    try:
        with _server(plan, arm, console) as server:
            first: list[Answer] = []
            _ask(plan, server, load_suite(plan.suites[0], _WARM_UP_REQUESTS, _WARM_UP_SEED), first)
            if arm.is_speculating and first and not any(answer.has_counters for answer in first):
                raise BenchError("its server tells no verify steps; SGLang 0.5.23 does, 0.5.17 does not")
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*columns, console=console) as bar:
                for name, prompts in phases:
                    answers = []
                    task = bar.add_task(f"{arm.name}, {name}", total=len(prompts))
                    _ask(plan, server, prompts, answers, partial(bar.advance, task))
                    if failed := [answer.error for answer in answers if answer.error]:
                        raise BenchError(f"{len(failed)} of {len(prompts)} requests failed, the first with {failed[0]}")
                    played.append(phase_of(name, answers, plan.window_requests))
                    answers = []
            num_swaps, error = _num_swaps(server), ""
    except OnlinespecError as failure:  # of this arm; the others go on
        error = str(failure)
        console.print(f"{arm.name}: {error}; what it answered is kept, and the same command plays it again")
    finally:
        if answers:
            played.append(phase_of(name, answers, plan.window_requests))
        results.put(LiveRow(arm.name, not error, error, played, num_swaps), arm=arm.name)


def _ask(
    plan: LivePlan,
    server: Server,
    prompts: Sequence[Prompt],
    answers: list[Answer],
    on_answer: Callable[[], None] = lambda: None,
) -> None:
    """Fills `answers` as they end, so that what was answered survives whatever ends this."""

    def take(answer: Answer) -> None:
        answers.append(answer)
        on_answer()

    asyncio.run(drive(server.base_url, prompts, plan.sampling, plan.num_users, take))


def _num_swaps(server: Server) -> int:
    if server.paths is None:
        return 0
    status = ControlClient(server.paths.control_endpoint).request(GetStatus())
    assert isinstance(status, Status), status
    return status.num_swaps


@contextlib.contextmanager
def _server(plan: LivePlan, arm: Arm, console: Console) -> Iterator[Server]:
    """Its log stays beside the result; its run directory goes with it."""
    log, port = plan.out.with_suffix(f".{arm.name.split()[0]}.log"), free_port()
    console.print(f"{arm.name}: starting its server; its log is {log}")
    with tempfile.TemporaryDirectory(prefix="osb-") as root:
        if not arm.is_training:
            draft = _draft_folder(plan, Path(root)) if arm.is_speculating else None
            command = stock_command(plan.target, port, draft, plan.num_draft_steps, arm.is_adaptive, plan.flags)
            with serving(command, port, log) as server:
                yield server
            return
        is_recipe, paths = arm.gate == "steps", RunPaths(root)
        paths.create()
        sets = [*plan.overrides, *arm.overrides, *(["supervisor.sidecar=false"] if is_recipe else [])]
        command = our_command(
            plan.target, port, plan.draft, paths.root, plan.num_draft_steps, plan.config_files, sets, plan.flags
        )
        with (
            serving(command, port, log, paths) as server,
            _recipe(paths, log) if is_recipe else contextlib.nullcontext(),
        ):
            yield server


def _draft_folder(plan: LivePlan, root: Path) -> Path:
    """A draft that stock SGLang can load: an untrained one is the very one that the other arms begin with."""
    if not is_fresh(plan.draft):
        return Path(plan.draft)
    seed = load_config(plan.config_files, plan.overrides).trainer.seed
    write_draft(root / "draft", *read_start(plan.draft, plan.target, seed))
    return root / "draft"


@contextlib.contextmanager
def _recipe(paths: RunPaths, log: Path) -> Iterator[None]:
    """The recipe's trainer in the sidecar's place. Raises: BenchError where it ended on its own."""
    command = [sys.executable, "-m", "onlinespec.bench.stream_recipe", str(paths.root)]
    with log.with_suffix(".trainer.log").open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield
        if process.poll() is not None:
            raise BenchError(f"the recipe's trainer ended with status {process.returncode}; see {file.name}")
    finally:
        process.terminate()
        process.wait()


def _show(results: Results, arms: Sequence[Arm], console: Console) -> bool:
    """Table and plot of what there is; whether every arm is complete."""
    rows = [msgspec.convert(row, LiveRow, strict=False) for row in results.rows]
    is_whole = {arm.name for arm in arms} <= {row.arm for row in rows if row.is_complete}
    lines = summarise_live(rows)
    results.write({"summary": msgspec.to_builtins(lines)})
    if lines:
        console.print(table(lines))
        plot(rows, results.path.with_suffix(".png"))
    if not is_whole:
        console.print("not every arm is complete; the same command goes on")
    console.print(f"written to {results.path}")
    return is_whole


def plot(rows: Sequence[LiveRow], path: Path) -> None:
    """Tokens/s and accept length by window, phases one after another."""
    figure, (speeds, lengths) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, constrained_layout=True)
    for row in rows:
        windows = [window for phase in row.phases for window in phase.windows]
        speeds.plot([window.tokens_per_s for window in windows], label=row.arm)
        lengths.plot([window.accept_length for window in windows], label=row.arm)
    longest = max(rows, key=lambda row: len(row.phases))
    begins = list(itertools.accumulate((len(phase.windows) for phase in longest.phases), initial=0))
    for axes, label in ((speeds, "output tokens/s"), (lengths, "accept length")):
        axes.set(ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
        for begin, phase in zip(begins, longest.phases, strict=False):
            axes.axvline(begin - 0.5, color="grey", linestyle=":")
            axes.text(begin - 0.4, 0, phase.name, color="grey", fontsize=8, va="bottom")
    lengths.set(xlabel="window of answers")
    lengths.xaxis.get_major_locator().set_params(integer=True)
    speeds.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
