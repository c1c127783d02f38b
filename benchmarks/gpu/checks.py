"""The checks that need a GPU, in order of worth, each also alone: `make gpu`.

What this machine lacks is said first, and what cannot run for it is left out by name. Each check is a list of commands
under one time limit; what they print goes to OUT/<check>.log, their JSON to OUT as soon as it is there, and a check
that fails does not stop the next one. OUT/summary.json says what became of each.

Run: python benchmarks/gpu/checks.py OUT [--only closes rows ...] [--dry-run]
"""

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))
from provenance import provenance  # noqa: E402 - found by the line above

PYTHON = sys.executable
WIDE = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
SHAPES_GB = 20


@dataclass(frozen=True)
class Check:
    """commands: words, OUT standing for the folder of results. goal: in words, for whoever reads the figures."""

    name: str
    question: str
    goal: str
    commands: tuple[tuple[str, ...], ...]
    limit_s: int
    needs_shapes: bool = False


def pytest_of(*modules: str) -> tuple[str, ...]:
    return (PYTHON, "-m", "pytest", "-q", *(f"tests/integration/test_{module}.py" for module in modules))


def script(name: str, *words: str) -> tuple[str, ...]:
    return (PYTHON, f"benchmarks/{name}.py", *words)


SHAPES = "OUT/shapes"
SERVED_8B = ("--target", SHAPES, "--draft", "init:configs/draft_models/llama-3.1-8b-32k.json")
CHECKS = (
    Check(
        "closes",
        "Does the loop close with CUDA graphs, overlap scheduling and radix cache on, and do answers stay the same?",
        "every check of the demo; 100 greedy answers equal under swaps, or apart at a near-tie",
        (
            (PYTHON, "-m", "onlinespec.cli", "demo", "--tokens", "20000", "--run-dir", "OUT/demo"),
            pytest_of("identity"),
        ),
        1500,
    ),
    Check(
        "rows",
        "Are rows right under overlap and CUDA graphs, and does the shadow equal the live counters?",
        "equal as integers; logits within bfloat16's tolerance",
        (pytest_of("rows", "switchback", "updates"), script("bench_shadow_fidelity", "OUT/fidelity.json")),
        1500,
    ),
    Check(
        "tap",
        "What does the tap cost at 1, 8, 32, 64 requests on Llama-3.1-8B's shape?",
        "tokens/s at most 0.5 % less, p99 between tokens at most 1 % more",
        tuple(
            (
                *(PYTHON, "-m", "onlinespec.cli", "bench", "overhead", *SERVED_8B),
                *("--concurrency", str(users), "--json", f"OUT/tap-{users}.json"),
            )
            for users in (1, 8, 32, 64)
        ),
        2400,
        needs_shapes=True,
    ),
    Check(
        "swap",
        "How long is the longest gap between tokens at a swap of a draft of the true size?",
        "within one decode step; floor 2 x bytes / 4.3 TB/s",
        (script("bench_swap", "OUT/swap.json", "--streams", "1", "16", *SERVED_8B),),
        600,
        needs_shapes=True,
    ),
    Check(
        "trainer",
        "How fast does a step train on Llama-3.1-8B's shape, in how much memory?",
        "above the plain recipe in both",
        (script("gpu/trainer", "OUT/trainer.json"),),
        600,
    ),
    Check(
        "goodput",
        "What is it worth after a shift, against a frozen draft and no speculation?",
        "0.98 of no speculation in every phase; more than the frozen draft after the shift",
        ((PYTHON, "-m", "onlinespec.cli", "bench", "stream", "--json", "OUT/goodput.json"),),
        2400,
    ),
)


def lacking() -> list[str]:
    """What this machine has not, and what that leaves out."""
    found = []
    if not torch.cuda.is_available():
        found.append("no CUDA device that torch sees: nothing here is measured")
    elif torch.cuda.get_device_capability() < (8, 0):
        found.append("the GPU is older than sm_80: bfloat16 and FlashInfer are not what the figures are meant for")
    if importlib.util.find_spec("sglang") is None:
        found.append("no sglang: every check but `trainer` is left out; see `make gpu-kit`")
    if shutil.which("nvcc") is None:
        found.append("no nvcc: serve with --attention-backend triton, FlashInfer's kernels cannot be compiled")
    if shutil.disk_usage(ROOT).free < SHAPES_GB * 2**30:
        found.append(f"less than {SHAPES_GB} GiB of disk: the 8B shapes, and so `tap` and `swap`, are left out")
    return found


def cannot(check: Check) -> str:
    """Why this check is left out on this machine; empty where it is not."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if check.name != "trainer" and importlib.util.find_spec("sglang") is None:
        return "no sglang"
    if check.needs_shapes and shutil.disk_usage(ROOT).free < SHAPES_GB * 2**30:
        return "too little disk for the 8B shapes"
    return ""


def unresolved(check: Check) -> list[str]:
    """Files that the check's commands name and that are not here."""
    named = {word for command in check.commands for word in command if word.endswith((".py", ".json"))}
    given = {word.partition(":")[2] if word.startswith("init:") else word for word in named}
    return sorted(word for word in given if not word.startswith("OUT/") and not (ROOT / word).exists())


def unknown_options(command: tuple[str, ...]) -> list[str]:
    """Options of a command of ours that its own help does not name."""
    options = [word for word in command if word.startswith("--")]
    if "pytest" in command or not options:
        return []
    words = list(itertools.takewhile(lambda word: not word.startswith(("--", "OUT")), command))
    said = subprocess.run([*words, "--help"], cwd=ROOT, capture_output=True, text=True, env=WIDE).stdout
    return [f"{' '.join(words[1:])} has no {option}" for option in options if option not in said]


def run(check: Check, out: Path) -> dict[str, object]:
    """Every command of a check, whatever becomes of the one before."""
    began_s = time.monotonic()
    statuses = []
    with (out / f"{check.name}.log").open("ab") as log:
        for words in check.commands:
            command = [word.replace("OUT", str(out)) if word.startswith("OUT") else word for word in words]
            left_s = check.limit_s - (time.monotonic() - began_s)
            try:
                done = subprocess.run(
                    command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=max(1, left_s), env=WIDE
                )
                statuses.append(done.returncode)
            except subprocess.TimeoutExpired:
                statuses.append("over the time limit")
    seconds = round(time.monotonic() - began_s, 1)
    return {"check": check.name, "goal": check.goal, "statuses": statuses, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=[check.name for check in CHECKS])
    parser.add_argument("--dry-run", action="store_true", help="say what would run; fails where a file is missing")
    options = parser.parse_args()
    out = options.out.absolute()
    for line in lacking():
        print(f"cannot: {line}")
    wanted = [check for check in CHECKS if not options.only or check.name in options.only]
    if options.dry_run:
        return dry_run(wanted)
    out.mkdir(parents=True, exist_ok=True)
    if any(check.needs_shapes and not cannot(check) for check in wanted) and not (out / "shapes").exists():
        subprocess.run(script("gpu/shapes", str(out / "shapes")), cwd=ROOT, check=True)
    found = []
    for check in wanted:
        why = cannot(check)
        found.append({"check": check.name, "left_out": why} if why else run(check, out))
        print(json.dumps(found[-1]), flush=True)
        (out / "summary.json").write_text(json.dumps({**provenance(), "checks": found}, indent=1) + "\n")
    return 0 if all(set(row.get("statuses", ["left out"])) == {0} for row in found) else 1


def dry_run(checks: list[Check]) -> int:
    missing = []
    for check in checks:
        why = cannot(check)
        print(f"\n{check.name}: {check.question}\n  goal: {check.goal}" + (f"\n  left out here: {why}" if why else ""))
        for command in check.commands:
            print("  " + " ".join(command).replace(PYTHON, "python"))
        missing += [f"{check.name}: {word} is not here" for word in unresolved(check)]
        missing += [f"{check.name}: {told}" for command in check.commands for told in unknown_options(command)]
    for line in missing:
        print(line)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
