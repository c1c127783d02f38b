"""What a swap and a switchback do to the gaps between a stream's tokens: at them against away from them.

Answers stream to `openai` clients in a process of their own, each user asking again at once. Two versions are swapped
to and fro at uneven times; then a switchback between them runs with short blocks. A gap is the time between two
chunks of a stream (a chunk is what a verify step committed); it is at a swap where it meets the time from the order
to its ack, and at a change of the switchback where it meets the first decode step after the end of a pair's first
block, whose successor is always the other draft's. What is told of them: `onlinespec/bench/overhead_gaps.py`. The
machine is shared, so read ratios within a run.

Run: python benchmarks/bench_swap.py OUT.json --streams 1 16; the rows of another run join OUT.json. Other flags go to
SGLang as they are.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import threading
import time
from pathlib import Path

import numpy as np
import openai
import torch
from live import LiveServer, serving, until
from provenance import provenance

from onlinespec.bench.overhead_gaps import Window, compare, gaps_of
from onlinespec.demo.run import free_port
from onlinespec.draft.checkpoint import read_draft
from onlinespec.draft.header import digest
from onlinespec.wire.messages import BlockEnded, GetStatus, StartSwitchback, StopSwitchback, Swap
from onlinespec.wire.sockets import ControlClient, SampleReceiver
from onlinespec.world import WORLD
from onlinespec.world.corpus import prompts

MAX_TOKENS = 256
BLOCK_STEPS = 8
SETTLE_S = 5.0


def stream_answers(base_url: str, num_streams: int, stopping, out) -> None:
    """In a process of its own; puts, per answer, the times of its chunks."""
    out.put(asyncio.run(_stream(base_url, num_streams, stopping)))


async def _stream(base_url: str, num_streams: int, stopping) -> list[list[float]]:
    answers: list[list[float]] = []
    questions = prompts("code", num_streams)
    async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", timeout=600) as client:
        model = (await client.models.list()).data[0].id

        async def user() -> None:
            while not stopping.is_set():
                answers.append(chunk_s := [])
                stream = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": next(questions)}],
                    temperature=0.0,
                    max_tokens=MAX_TOKENS,
                    stream=True,
                )
                async for chunk in stream:
                    if chunk.choices and chunk.choices[0].delta.content:
                        chunk_s.append(time.monotonic())
                    if stopping.is_set():
                        break
                await stream.close()

        await asyncio.gather(*(user() for _ in range(num_streams)))
    return answers


class Blocks:
    """Takes all samples, as a sidecar would, and keeps when blocks of a switchback ended."""

    def __init__(self, endpoint: str):
        self.ends_s: list[float] = []
        """of first blocks: the next step is the other draft's"""
        self._is_done = threading.Event()
        self._receiver = SampleReceiver(endpoint)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_done.is_set():
            received = self._receiver.receive(0.1)
            if received is not None and isinstance(received[0], BlockEnded) and received[0].index == 0:
                self.ends_s.append(time.monotonic())

    def close(self) -> None:
        self._is_done.set()
        self._thread.join()
        self._receiver.close()


def swaps(server: LiveServer, second: int, num_swaps: int) -> tuple[list[Window], list[float]]:
    """To and fro, one and a half to three seconds apart; windows and the copies' own durations as acked."""
    control, rng = ControlClient(server.paths.control_endpoint), random.Random(1)
    orders = [Swap(v, str(server.paths.version(v)), digest(server.paths.version(v))) for v in (1, second)]
    windows, durations_s = [], []
    for i in range(num_swaps):
        time.sleep(rng.uniform(1.5, 3.0))
        began_s = time.monotonic()
        ack = control.acknowledged(orders[i % 2])
        windows.append((began_s, time.monotonic()))
        assert ack.is_ok, ack.message
        durations_s.append(ack.duration_s)
    return windows, durations_s


def switchback(server: LiveServer, candidate: int, seconds: float) -> Window:
    """Short blocks for so long."""
    control, path = ControlClient(server.paths.control_endpoint), server.paths.version(candidate)
    began_s = time.monotonic()
    order = StartSwitchback(candidate, str(path), digest(path), BLOCK_STEPS, 100_000, seed=1)
    ack = control.acknowledged(order)
    assert ack.is_ok, ack.message
    time.sleep(seconds)
    control.acknowledged(StopSwitchback())
    return began_s, time.monotonic()


def run_load(server: LiveServer, second: int, num_streams: int, num_swaps: int, switchback_s: float) -> list[dict]:
    """A row for swaps and one for a switchback; the version in service at the end is another or the same."""
    context = multiprocessing.get_context("spawn")
    stopping, out = context.Event(), context.Queue()
    blocks = Blocks(server.paths.samples_endpoint)
    clients = context.Process(target=stream_answers, args=(server.base_url, num_streams, stopping, out))
    clients.start()
    control = ControlClient(server.paths.control_endpoint)
    until(lambda: control.request(GetStatus()).counters["running_requests"] == num_streams, 120)
    time.sleep(SETTLE_S)
    began_s = time.monotonic()
    windows, durations_s = swaps(server, second, num_swaps)
    time.sleep(1.0)
    swap_span = began_s, time.monotonic()
    time.sleep(1.0)
    in_service = control.request(GetStatus()).version
    switchback_span = switchback(server, 1 if in_service == second else second, switchback_s)
    stopping.set()
    answers = out.get(timeout=120)
    clients.join()
    blocks.close()
    swap_gaps, switchback_gaps = gaps_of(answers, swap_span), gaps_of(answers, switchback_span)
    step_s = float(np.median(switchback_gaps[:, 1] - switchback_gaps[:, 0]))
    changes = [(end_s, end_s + step_s) for end_s in blocks.ends_s if end_s + step_s < switchback_span[1]]
    row = {**provenance(), "streams": num_streams}
    return [
        {**row, "what": "swap", **compare(swap_gaps, windows, swap_span), "duration_ms": milliseconds(durations_s)},
        {**row, "what": "switchback", **compare(switchback_gaps, changes, switchback_span)},
    ]


def run(out: Path, server: LiveServer, loads: list[int], num_swaps: int, switchback_s: float) -> None:
    """Add rows of each load to the report."""
    _, weights = read_draft(server.paths.version(1))
    second = server.swap({n: t + 1e-3 * t.std() if t.is_floating_point() else t for n, t in weights.items()})
    for num_streams in loads:
        rows = json.loads(out.read_text())["rows"] if out.exists() else []
        found = run_load(server, second, num_streams, num_swaps, switchback_s)
        out.write_text(json.dumps({"block_steps": BLOCK_STEPS, "rows": rows + found}, indent=1) + "\n")
        print(json.dumps(found, indent=1), flush=True)


def milliseconds(durations_s: list[float]) -> dict[str, float]:
    return {
        "median": round(1e3 * float(np.median(durations_s)), 2),
        "longest": round(1e3 * max(durations_s), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--swaps", type=int, default=40)
    parser.add_argument("--switchback-seconds", type=float, default=60)
    parser.add_argument("--target", default=str(WORLD))
    parser.add_argument("--draft", default="init")
    options, flags = parser.parse_known_args()
    torch.set_num_threads(1)
    with serving(free_port(), draft=options.draft, target=options.target, sglang_flags=flags) as server:
        run(options.out, server, options.streams, options.swaps, options.switchback_seconds)


if __name__ == "__main__":
    main()
