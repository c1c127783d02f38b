"""Real servers for the integration tests: started as a user would, one at a time."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import msgspec
import torch
import torch.multiprocessing

from onlinespec.bench.accept import drive
from onlinespec.bench.client import Answer, Prompt, Sampling
from onlinespec.paths import RunPaths
from onlinespec.resolve import dump_config, load_config
from onlinespec.wire.sockets import ControlClient
from onlinespec.world import WORLD
from onlinespec.world.corpus import DOMAINS, prompts

REPOSITORY = Path(__file__).parent.parent.parent
DEMO_CONFIG = REPOSITORY / "configs" / "demo.yaml"
READY_S = 300
_running: list["Server"] = []


@dataclass
class Server:
    """A running `onlinespec serve`, or a plain SGLang server where `paths` has no run."""

    process: subprocess.Popen
    base_url: str
    paths: RunPaths
    log: Path
    probe: Path = Path("/nonexistent")

    @property
    def control(self) -> ControlClient:
        return ControlClient(self.paths.control_endpoint)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(120)


def start(command: Sequence[str], port: int, root: Path, is_ready, environment: dict[str, str] | None = None) -> Server:
    """Start a command that serves on a port, and wait until `is_ready(server)`. The one before it is stopped."""
    while _running:
        _running.pop().stop()
    root.mkdir(parents=True, exist_ok=True)
    log = root / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
    server = Server(process, f"http://127.0.0.1:{port}", RunPaths(root), log)
    deadline_s = time.monotonic() + READY_S
    while not is_ready(server):
        if process.poll() is not None or time.monotonic() > deadline_s:
            server.stop(signal.SIGKILL)
            raise AssertionError(f"the server did not become ready:\n{server.log_text()[-3000:]}")
        time.sleep(0.3)
    _running.append(server)
    return server


def start_ours(
    root: Path, port: int, draft: str = "init", sets: Sequence[str] = (), flags: Sequence[str] = (), **kwargs
) -> Server:
    """`onlinespec serve` of the demo world, unless told otherwise from a fresh draft."""
    overrides = [part for value in sets for part in ("--set", value)]
    ours = ["--draft", draft, "--config", str(DEMO_CONFIG), "--run-dir", str(root), *overrides]
    command = ["-m", "onlinespec.cli", "serve", str(WORLD), *ours, "--port", str(port), "--random-seed", "1"]
    return start(
        [*command, "--log-level", "warning", *flags],
        port,
        root,
        lambda server: "onlinespec: ready" in server.log_text(),
        **kwargs,
    )


def start_plain(root: Path, port: int) -> Server:
    """Stock SGLang on this CPU without speculation and without us."""
    command = ["-m", "onlinespec.cpu.launch", "--model-path", str(WORLD), "--port", str(port), "--random-seed", "1"]
    return start([*command, "--log-level", "warning"], port, root, _is_healthy)


def _is_healthy(server: Server) -> bool:
    try:
        with urllib.request.urlopen(f"{server.base_url}/health_generate", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def world_prompts(count: int, seed: int, domains: Sequence[str] = DOMAINS) -> list[Prompt]:
    """Prompts of the demo world, the domains in turn."""
    streams = {domain: prompts(domain, seed) for domain in domains}
    return [Prompt.of_text(domains[i % len(domains)], next(streams[domains[i % len(domains)]])) for i in range(count)]


def send(server: Server, asked: Sequence[Prompt], concurrency: int = 4, **sampling) -> list[Answer]:
    """Ask through the OpenAI client; answers in the order they ended, every one without an error."""
    answers = asyncio.run(drive(server.base_url, asked, Sampling(**sampling), concurrency))
    failed = [answer.error for answer in answers if answer.error]
    assert not failed, failed[:3]
    return answers


@contextlib.contextmanager
def sidecar(served: Server, command: Sequence[str] = ("-m", "onlinespec.sidecar"), **changes) -> Iterator[None]:
    """Run a sidecar on a server that has none, from nothing, with some sections of its config replaced."""
    config = load_config([served.paths.resolved_config])
    sections = {name: msgspec.structs.replace(getattr(config, name), **fields) for name, fields in changes.items()}
    served.paths.resolved_config.write_text(dump_config(msgspec.structs.replace(config, **sections)))
    served.paths.trainer_state.unlink(missing_ok=True)
    served.paths.sidecar_status.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, *command, str(served.paths.root)], env=environment)
    try:
        yield
        assert process.poll() is None, "the sidecar ended early"
    finally:
        process.terminate()
        process.wait(30)
        served.paths.resolved_config.write_text(dump_config(config))


def sidecar_status(server: Server) -> dict:
    """What the sidecar last reported; empty before its first word."""
    try:
        return json.loads(server.paths.sidecar_status.read_bytes())
    except FileNotFoundError:
        return {}


class Load:
    """Users who ask without a pause until it ends; every request must succeed. answers: in the order they ended."""

    def __init__(self, server: Server, domain: str = "code", seed: int = 100, num_users: int = 4, max_tokens: int = 64):
        self.answers: list[Answer] = []
        self._is_done = threading.Event()
        asked, sampling = self._asked(domain, seed), Sampling(max_tokens=max_tokens)
        self._thread = threading.Thread(
            target=lambda: asyncio.run(drive(server.base_url, asked, sampling, num_users, self.answers.append))
        )

    def _asked(self, domain: str, seed: int) -> Iterator[Prompt]:
        for text in prompts(domain, seed):
            if self._is_done.is_set():
                return
            yield Prompt.of_text(domain, text)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_exc) -> None:
        self._is_done.set()
        self._thread.join()
        failed = [answer.error for answer in self.answers if answer.error]
        assert not failed, failed[:3]


def wait_for(condition, what: str, limit_s: float = 480) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {limit_s:.0f} s for {what}"
        time.sleep(0.1)


def flush(server: Server) -> None:
    """Forget cached prefixes: their draft KV may be another version's."""
    request = urllib.request.Request(f"{server.base_url}/flush_cache", method="POST")
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200


def post(server: Server, path: str, **body) -> None:
    data = json.dumps(body).encode()
    request = urllib.request.Request(server.base_url + path, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert answer.status == 200


def update_weights(server: Server, selector: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """SGLang's own weight update session, as an RL trainer uses it. selector: "target", "draft" or "all"."""
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")  # the other would want the server to be our child
    try:
        named = bytes(ForkingPickler.dumps(list(tensors.items())))
        post(server, "/begin_weight_update", selector=selector)
        post(
            server,
            "/update_weights_from_tensor",
            serialized_named_tensors=[base64.b64encode(named).decode()],
            selector=selector,
        )
        post(server, "/end_weight_update")
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
