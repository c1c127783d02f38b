"""Check: what the GPU and the scheduler do in some decode steps with the tap on, by SGLang's own torch profiler.

A server under a steady load, its rows taken as by a sidecar that does nothing else. The trace stays beside OUT.json,
to be looked at in Perfetto; OUT.json has the share of time in which the device works, and the names that take most.

Run: python benchmarks/gpu/decode_profile.py OUT.json [--target DIR --draft DRAFT --suite PROMPTS]
Other flags go to SGLang as they are.
"""

import argparse
import gzip
import itertools
import json
import shutil
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from live import serving, until
from provenance import provenance

from onlinespec.bench.client import Sampling
from onlinespec.bench.overhead import Load
from onlinespec.bench.stream_serve import free_port
from onlinespec.bench.suites import load_suite
from onlinespec.wire.messages import GetStatus
from onlinespec.wire.sockets import ControlClient, SampleReceiver
from onlinespec.world import WORLD

ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
ON_HOST = {"cpu_op", "cuda_runtime", "cuda_driver"}
TOP = 20
SETTLE_S = 5.0


def drain(endpoint: str, is_done: threading.Event) -> None:
    receiver = SampleReceiver(endpoint)
    while not is_done.is_set():
        receiver.receive(0.1)
    receiver.close()


def record(base_url: str, folder: Path, num_steps: int) -> Path:
    """The trace of so many steps. Source: SGLang 0.5.23 managers/io_struct.py ProfileReq."""
    shutil.rmtree(folder, ignore_errors=True)  # an earlier try's trace would pass for this one's
    folder.mkdir(parents=True)
    activities = ["CPU", "GPU"] if torch.cuda.is_available() else ["CPU"]
    body = {"output_dir": str(folder.absolute()), "num_steps": num_steps, "activities": activities}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{base_url}/start_profile", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as answer:
        assert answer.status == 200, answer.status
    until(lambda: any(is_whole(path) for path in folder.glob("*.trace.json.gz")), 300)
    return next(folder.glob("*.trace.json.gz"))


def is_whole(trace: Path) -> bool:
    try:
        with gzip.open(trace) as file:
            json.load(file)
    except (EOFError, ValueError):
        return False  # still being written
    return True


def summary(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a trace's complete events; times in milliseconds. No device: busy_frac is None."""
    timed = [event for event in events if event.get("ph") == "X" and "dur" in event]
    device = sorted((e["ts"], e["ts"] + e["dur"]) for e in timed if e.get("cat") in ON_DEVICE)
    busy_us, end_us = 0.0, float("-inf")
    for begin, end in device:  # overlapping streams count once
        busy_us += max(0.0, end - max(begin, end_us))
        end_us = max(end_us, end)
    return {
        "busy_frac": round(busy_us / (end_us - device[0][0]), 4) if device else None,
        "device_ms": largest(timed, ON_DEVICE),
        "host_ms": largest(timed, ON_HOST),
    }


def largest(events: list[dict[str, Any]], categories: set[str]) -> dict[str, float]:
    """Name -> sum of its durations; host operations count what they call too."""
    sums: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in categories:
            sums[event["name"][:120]] += event["dur"]
    return {name: round(us / 1e3, 3) for name, us in sums.most_common(TOP)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", type=Path, default=WORLD)
    parser.add_argument("--draft", default="init")
    parser.add_argument("--suite", default="demo")
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    options, flags = parser.parse_known_args()
    is_done = threading.Event()
    with serving(free_port(), draft=options.draft, target=options.target, sglang_flags=flags) as server:
        drainer = threading.Thread(target=drain, args=(server.paths.samples_endpoint, is_done), daemon=True)
        drainer.start()
        asked = itertools.cycle(load_suite(options.suite, 500, 1))
        load = Load(server.base_url, asked, Sampling(max_tokens=256), options.users)
        load.start()
        control = ControlClient(server.paths.control_endpoint)
        until(lambda: control.request(GetStatus()).counters["running_requests"] == options.users, 120)
        time.sleep(SETTLE_S)
        trace = record(server.base_url, options.out.with_suffix(".trace"), options.steps)
        load.stop()
        is_done.set()
        drainer.join()
    with gzip.open(trace) as file:
        found = summary(json.load(file)["traceEvents"])
    report = {**provenance(), "users": options.users, "steps": options.steps, "trace": trace.name, **found}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
