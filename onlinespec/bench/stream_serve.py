"""Servers that a bench starts for itself and ends with itself: stock SGLang, or `onlinespec serve`.

Each is a process group of its own: a Ctrl-C is the bench's, which then writes what it has and stops the server.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onlinespec.cpu.settings as cpu_settings
from onlinespec.errors import StartError
from onlinespec.paths import RunPaths

READY_S = 600.0
_STOP_S = 60.0
_POLL_S = 0.3
_FLAGS = ("--random-seed", "1", "--log-level", "warning")


@dataclass(frozen=True)
class Server:
    """One that answers. paths: of its run directory; None for stock SGLang."""

    base_url: str
    process: subprocess.Popen
    log: Path
    paths: RunPaths | None = None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stock_command(
    model: Path, port: int, draft: Path | None, num_draft_steps: int, is_adaptive: bool, flags: Sequence[str]
) -> list[str]:
    """Stock SGLang; our plugin is inert in it. draft: None serves without speculation."""
    module = "onlinespec.cpu.launch" if cpu_settings.is_needed() else "sglang.launch_server"
    command = [sys.executable, "-m", module, "--model-path", str(model), "--host", "127.0.0.1", "--port", str(port)]
    if draft is not None:
        command += ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(draft)]
        command += ["--speculative-num-steps", str(num_draft_steps), "--speculative-eagle-topk", "1"]
        command += ["--speculative-num-draft-tokens", str(num_draft_steps + 1)]
        command += ["--speculative-adaptive"] if is_adaptive else []
    return [*command, *_FLAGS, *flags]


def our_command(
    model: Path,
    port: int,
    draft: str,
    run_dir: Path,
    num_draft_steps: int,
    config_files: Sequence[Path],
    overrides: Sequence[str],
    flags: Sequence[str],
) -> list[str]:
    command = [sys.executable, "-m", "onlinespec.cli", "serve", str(model), "--draft", draft, "--run-dir", str(run_dir)]
    command += [part for path in config_files for part in ("--config", str(path))]
    command += [part for override in overrides for part in ("--set", override)]
    command += ["--port", str(port), "--speculative-num-steps", str(num_draft_steps)]
    command += ["--speculative-num-draft-tokens", str(num_draft_steps + 1)]
    return [*command, *_FLAGS, *flags]


@contextlib.contextmanager
def serving(command: Sequence[str], port: int, log: Path, paths: RunPaths | None = None) -> Iterator[Server]:
    """Start, wait until it answers and, where it is ours, says that it is ready; stop at the end, a SIGTERM's too.

    Raises: StartError with the last line of the log where it ended before that, or took longer than READY_S.
    """
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: it would outlive us otherwise
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        server = Server(f"http://127.0.0.1:{port}", process, log, paths)
        _wait_ready(server)
        yield server
    finally:
        _stop(process)
        signal.signal(signal.SIGTERM, handler)


def _wait_ready(server: Server) -> None:
    deadline_s = time.monotonic() + READY_S
    while not _is_ready(server):
        if server.process.poll() is not None or time.monotonic() > deadline_s:
            raise StartError(
                f"the server did not become ready (status {server.process.returncode}): {last_line(server.log)}; "
                f"see {server.log}"
            )
        time.sleep(_POLL_S)


def _is_ready(server: Server) -> bool:
    if server.paths is not None and "onlinespec: ready" not in server.log.read_text(errors="replace"):
        return False
    try:
        with urllib.request.urlopen(f"{server.base_url}/health", timeout=10) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "nothing was logged"


def _stop(process: subprocess.Popen) -> None:
    """SIGTERM, then SIGKILL to what is left of its group."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
