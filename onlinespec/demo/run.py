"""`onlinespec demo`: the whole loop on the demo world, from an untrained draft, in front of one's eyes."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.live import Live

import onlinespec
from onlinespec.bench.client import Sampling
from onlinespec.bench.provenance import provenance
from onlinespec.bench.stream_serve import free_port
from onlinespec.demo.plot import plot
from onlinespec.demo.result import Result, build_result, checks
from onlinespec.demo.screen import Screen, final
from onlinespec.demo.traffic import Phase, Record, Traffic
from onlinespec.errors import OnlinespecError, StartError, WireError
from onlinespec.operate import roll_back
from onlinespec.paths import RunPaths
from onlinespec.resolve import load_config
from onlinespec.versions.journal import Journal
from onlinespec.versions.state import state_of
from onlinespec.wire.messages import GetStatus, Status
from onlinespec.wire.sockets import ControlClient
from onlinespec.world import WORLD
from onlinespec.world.corpus import FIRST_DOMAIN, SHIFT_DOMAIN

CONFIG = Path(onlinespec.__file__).parent.parent / "configs" / "demo.yaml"
ROLLBACK_TOKENS = 2_000
TRAFFIC_SEED = 1
PLAIN_EVERY = 50


def run_demo(
    run_dir: Path | None,
    tokens_per_phase: int,
    overrides: Sequence[str] = (),
    target: Path | None = None,
    sglang_flags: Sequence[str] = (),
) -> int:
    """Serve, play the phases, roll back and undo it, show; returns the exit status: 0 where every check is met.

    target: None for the demo world's own.
    Raises: OnlinespecError where the server cannot be started.
    """
    root = run_dir or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    paths = RunPaths(root)
    paths.create()
    console = Console()
    port = free_port()
    console.print(f"starting SGLang with an untrained draft, about a minute; its log is {paths.log}")
    with paths.log.open("wb") as log:
        command = serve_command(paths, port, overrides, target or WORLD, sglang_flags)
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the server would outlive us otherwise
    try:
        wait_ready(paths, server, console)
        result = asyncio.run(_play(paths, f"http://127.0.0.1:{port}", tokens_per_phase, overrides, console))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    found = checks(result)
    console.print(final(result, found))
    console.print(f"result: {paths.demo_result}\nplot:   {paths.demo_plot}\nlog:    {paths.log}")
    return 0 if all(check.is_met for check in found) else 1


def serve_command(
    paths: RunPaths, port: int, overrides: Sequence[str], target: Path, sglang_flags: Sequence[str]
) -> list[str]:
    ours = ["--draft", "init", "--config", str(CONFIG), "--run-dir", str(paths.root)]
    sets = [part for override in overrides for part in ("--set", override)]
    flags = ["--port", str(port), "--random-seed", "1", "--log-level", "warning", *sglang_flags]
    return [sys.executable, "-m", "onlinespec.cli", "serve", str(target), *ours, *sets, *flags]


def wait_ready(paths: RunPaths, server: subprocess.Popen, console: Console) -> None:
    """Until `serve` says so in its log. Raises: StartError with the log's last line where it ended first."""
    with console.status("waiting for the server") as spinner:
        began_s = time.monotonic()
        while "onlinespec: ready" not in (text := paths.log.read_text(errors="replace")):
            if server.poll() is not None:
                last = next((line for line in reversed(text.splitlines()) if line.strip()), "nothing was logged")
                raise StartError(f"the server ended with status {server.returncode}: {last}; see {paths.log}")
            spinner.update(f"waiting for the server, {time.monotonic() - began_s:.0f} s")
            time.sleep(0.5)


async def _play(
    paths: RunPaths, base_url: str, tokens_per_phase: int, overrides: Sequence[str], console: Console
) -> Result:
    learning = [
        Phase(FIRST_DOMAIN, FIRST_DOMAIN, tokens_per_phase),
        Phase(SHIFT_DOMAIN, SHIFT_DOMAIN, tokens_per_phase),
    ]
    after = [Phase("rolled back", SHIFT_DOMAIN, ROLLBACK_TOKENS), Phase("undone", SHIFT_DOMAIN, ROLLBACK_TOKENS)]
    traffic = Traffic(base_url, str(WORLD), Sampling(max_tokens=200, tenant="demo"), TRAFFIC_SEED)
    screen = Screen([*learning, *after])
    began_s = time.monotonic()
    # Drawn when it is shown and not at each answer: what is drawn is summed over all answers, on the server's cores.
    with Live(
        get_renderable=lambda: screen.draw(list(traffic.records), read_sidecar(paths)),
        console=console,
        refresh_per_second=2,
    ):

        async def show(_record: Record) -> None:
            if not console.is_terminal and len(traffic.records) % PLAIN_EVERY == 0:
                console.print(screen.line(traffic.records, read_sidecar(paths)))

        for phase in learning:
            await traffic.play(phase, show)
        incumbent = state_of(Journal(paths).read()).incumbent
        for phase, to in zip(after, (None, incumbent), strict=True):
            try:
                screen.note = await asyncio.to_thread(roll_back, paths.root, to)
            except OnlinespecError as error:
                screen.note = f"no rollback: {error}"
            await traffic.play(phase, show)
    events = Journal(paths).read()
    config = load_config([CONFIG], overrides)
    result = build_result(
        [*learning, *after],
        traffic.records,
        events,
        dropped_rows=_dropped_rows(paths),
        seconds=time.monotonic() - began_s,
        holdout_frac=config.gate.holdout_frac,
        candidate_steps=config.gate.candidate_steps,
    )
    report = {"provenance": msgspec.to_builtins(provenance("", None)), **msgspec.to_builtins(result)}
    paths.demo_result.write_text(json.dumps(report, indent=2) + "\n")
    plot(traffic.records, events, 4, paths.demo_plot)
    return result


def read_sidecar(paths: RunPaths) -> dict:
    """What the sidecar reported last; empty before its first report."""
    try:
        return json.loads(paths.sidecar_status.read_bytes())
    except FileNotFoundError:
        return {}


def _dropped_rows(paths: RunPaths) -> int:
    status = ControlClient(paths.control_endpoint).request(GetStatus())
    if not isinstance(status, Status):
        raise WireError(f"the server answered {type(status).__name__}, wanted its Status")
    return status.counters.get("dropped_rows", 0)
