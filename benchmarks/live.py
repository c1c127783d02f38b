"""A real server under traffic for the benchmarks: `onlinespec serve` of the demo world with its sidecar left to us."""

import asyncio
import contextlib
import itertools
import multiprocessing
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import openai

from onlinespec.bench.client import Answer, Prompt, Sampling, ask
from onlinespec.draft.checkpoint import read_draft, write_draft
from onlinespec.draft.header import digest
from onlinespec.paths import RunPaths
from onlinespec.wire.messages import Swap
from onlinespec.wire.sockets import ControlClient
from onlinespec.world import WORLD
from onlinespec.world.corpus import live

READY_S = 480
Ask = Callable[[openai.AsyncOpenAI, str, Prompt, Sampling], Awaitable[Answer]]


@dataclass
class LiveServer:
    """One server; `versions` of ours live in its run directory without a journal."""

    paths: RunPaths
    base_url: str
    num_versions: int = 1
    longest_swap_s: float = 0.0

    def swap(self, weights: dict) -> int:
        """Put weights in service; the version's number."""
        config, _ = read_draft(self.paths.version(1))
        self.num_versions += 1
        folder = self.paths.version(self.num_versions)
        write_draft(folder, config, weights)
        control = ControlClient(self.paths.control_endpoint)
        ack = control.acknowledged(Swap(self.num_versions, str(folder), digest(folder)))
        assert ack.is_ok, ack.message
        self.longest_swap_s = max(self.longest_swap_s, ack.duration_s)
        return self.num_versions

    def flush(self) -> None:
        """Forget cached prefixes; wants an idle server."""
        request = urllib.request.Request(f"{self.base_url}/flush_cache", method="POST")
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 200, answer.status


@contextlib.contextmanager
def serving(
    port: int,
    sets: Sequence[str] = (),
    draft: str = "init",
    target: str | Path = WORLD,
    sglang_flags: Sequence[str] = (),
) -> Iterator[LiveServer]:
    """Boot, yield, stop; a SIGTERM to us ends the server too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="osb-") as root:
        paths = RunPaths(root)
        paths.create()
        flags = ["--port", str(port), "--random-seed", "1", "--log-level", "warning", *sglang_flags]
        ours = ["--draft", draft, "--run-dir", root, "--set", "supervisor.sidecar=false"]
        ours += [part for value in sets for part in ("--set", value)]
        command = [sys.executable, "-m", "onlinespec.cli", "serve", str(target), *ours, *flags]
        with paths.log.open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline_s = time.monotonic() + READY_S
            while "onlinespec: ready" not in (text := paths.log.read_text(errors="replace")):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise SystemExit(f"the server did not become ready: {text[-2000:]}")
                time.sleep(0.3)
            yield LiveServer(paths, f"http://127.0.0.1:{port}")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


def prefixed_prompts(domain: str, seed: int, num_prefixes: int, num_turns: int) -> Iterator[Prompt]:
    """Live questions behind one of a few fixed beginnings of `num_turns` earlier turns, in turn."""
    stream = live(domain, seed)
    prefixes = []
    for _ in range(num_prefixes):
        turns = list(itertools.islice(stream, num_turns))
        messages = [({"role": "user", "content": t.user}, {"role": "assistant", "content": t.answer}) for t in turns]
        prefixes.append(tuple(itertools.chain.from_iterable(messages)))
    for prefix in itertools.cycle(prefixes):
        yield Prompt(domain, (*prefix, {"role": "user", "content": next(stream).user}))


class Traffic:
    """Users in a process of their own until `stop`, so that a trainer in ours has its interpreter to itself.

    make_prompts, ask: picklable; the one gives the prompts, the other sends one. Answers come in the order they ended.
    """

    def __init__(
        self,
        base_url: str,
        make_prompts: Callable[[], Iterator[Prompt]],
        num_users: int,
        sampling: Sampling,
        ask: Ask = ask,
    ):
        context = multiprocessing.get_context("spawn")
        self._stopping, self._going, self._answers = context.Event(), context.Event(), context.Queue()
        self._going.set()
        arguments = (base_url, make_prompts, num_users, sampling, ask, self._stopping, self._going, self._answers)
        self._process = context.Process(target=_users, args=arguments, daemon=True)

    def start(self) -> None:
        self._process.start()

    def hold(self, is_held: bool) -> None:
        """Send nothing new meanwhile; requests in flight go on."""
        (self._going.clear if is_held else self._going.set)()

    def stop(self) -> list[Answer]:
        """Let the users finish; what they got."""
        self._stopping.set()
        self._going.set()
        answers = self._answers.get(timeout=120)
        self._process.join()
        return answers


def _users(base_url, make_prompts, num_users, sampling, ask, stopping, going, out) -> None:
    out.put(asyncio.run(_drive(base_url, make_prompts(), num_users, sampling, ask, stopping, going)))


async def _drive(base_url, prompts, num_users, sampling, ask, stopping, going) -> list[Answer]:
    answers: list[Answer] = []
    async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", timeout=600) as client:

        async def user() -> None:
            while not stopping.is_set():
                while not going.is_set():
                    await asyncio.sleep(0.01)
                answers.append(await ask(client, str(WORLD), next(prompts), sampling))

        await asyncio.gather(*(user() for _ in range(num_users)))
    return answers


def until(is_done: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_done():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s"
        time.sleep(0.05)
