"""The checks of `plan`, which need a GPU, each also alone: `make gpu`.

What this machine lacks is said first, and what cannot run for it is left out by name. What a part prints goes to
OUT/<check>-<part>.log, its JSON to OUT as soon as it is there, and one that fails does not stop the next.
OUT/summary.json says what became of each and is written after each; the same command goes on with the parts that have
not succeeded. With --seconds nothing outlasts them. OUT also gets the models made here, 17 GB: keep it out of git, and
copy what is to stay to benchmarks/results.

Run: python benchmarks/gpu/checks.py OUT [--only boots rows ...] [--part 2] [--seconds 520] [--pack FILE] [--dry-run]

On a machine that is lent for a while, takes one folder of small files back, and has neither a network nor a package
of ours (the kit lies in gpu-kit/; --seconds leaves time to unpack it and to pack what was found):

    mkdir -p /tmp/site && tar -C /tmp/site -xJf gpu-kit/sglang-0.5.23.tar.xz && PYTHONPATH=/tmp/site:$PWD \
        python3 benchmarks/gpu/checks.py runs/gpu --only kernels boots rows --seconds 520 --pack BACK/gpu.tgz

All of it is an hour and a half by guess. For half an hour: kernels, boots, rows; then closes, swap, trainer; then
tap with --part 3, duty with --part 2, goodput with --part 2. Figures are meant for an H200: a GPU of 80 GB has no
place for duty's trainer beside the server.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import torch
from plan import CHECKS, PART_S, PREPARED, PYTHON, SGLANG_FLAGS, Check, Words

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE.parent), str(ROOT)]
from provenance import provenance  # noqa: E402 - found by the line above

from onlinespec.draft.place import can_compile  # noqa: E402 - as well

ENVIRONMENT = {
    **os.environ,
    "COLUMNS": "200",
    "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT)))),
    "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1",  # the kit's kernels are those that torch 2.11 loads
    "SGLANG_ENABLE_JIT_DEEPGEMM": "0",  # 0.5.17 takes the kit's stand-in for the package
}
PREPARING = {**ENVIRONMENT, "OMP_NUM_THREADS": "8"}
"""no server runs meanwhile"""
SHAPES_GB = 20
STOP_S = 45
MIN_PART_S = 120
"""a server takes this long to start"""
BOOTS = "boots"
"""the check that tells whether a server starts at all: it writes its JSON then, be the rows right or not"""
PACKED = ("*.json", "*.log", "*.png", "*/*.json", "*/*.log", "*/*.png")


def has_sglang() -> bool:
    return importlib.util.find_spec("sglang") is not None


def has_counters() -> bool:
    """Whether SGLang's OpenAI API tells the verify steps of a request, as 0.5.23 does and 0.5.17 does not."""
    found = importlib.util.find_spec("sglang")
    if found is None or found.origin is None:
        return False
    protocol = Path(found.origin).parent / "srt" / "entrypoints" / "openai" / "protocol.py"
    return "return_spec_tokens_details" in protocol.read_text()


def has_plugin() -> bool:
    return "onlinespec" in {point.name for point in importlib.metadata.entry_points(group="sglang.srt.plugins")}


def server_flags() -> Words:
    """What every server is told beside a check's own flags. SGLang's default on this chip is FlashAttention 3, whose
    kernels are 1.1 GB and so not in the kit."""
    kernels = importlib.util.find_spec("sgl_kernel")
    if kernels is None or kernels.origin is None or list(Path(kernels.origin).parent.glob("flash_ops*")):
        return ()
    return ("--attention-backend", "triton", "--sampling-backend", "pytorch")


def has_room(out: Path) -> bool:
    """For the 8B shapes, or they are there."""
    return is_made("shapes", out) or shutil.disk_usage(ROOT).free >= SHAPES_GB * 2**30


def lacking(out: Path) -> list[str]:
    """What this machine has not, and what that leaves out."""
    found = []
    if not torch.cuda.is_available():
        found.append("no CUDA device that torch sees: nothing here is measured")
    elif torch.cuda.get_device_capability() < (8, 0):
        found.append("the GPU is older than sm_80: bfloat16 and FlashInfer are not what the figures are meant for")
    if not has_sglang():
        found.append("no sglang: every check but `trainer` is left out; see `make gpu-kit`")
    elif not has_plugin():
        found.append("sglang would not find onlinespec's plugin: pip install --no-deps -e ., or use the kit's folder")
    if shutil.which("nvcc") is None:
        found.append("no nvcc: kernels that SGLang compiles on first use cannot be")
    if not can_compile():
        found.append("no C compiler or no Python.h: triton builds a launcher of its own with them at run time")
    if not has_room(out):
        found.append(f"less than {SHAPES_GB} GiB of disk: what needs the 8B shapes is left out")
    return found


def cannot(check: Check, out: Path) -> str:
    """Why this check is left out on this machine; empty where it is not."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if check.has_server and not (has_sglang() and has_plugin()):
        return "no sglang that finds onlinespec's plugin"
    if check.has_counters and not has_counters():
        return "this SGLang's OpenAI API does not tell a request's verify steps"
    if check.has_server and check.name != BOOTS and (out / f"{BOOTS}-1.log").exists() and not boots_json(out).exists():
        return f"no server boots here, see {BOOTS}-1.log"
    if "shapes" in check.needs and not has_room(out):
        return "too little disk for the 8B shapes"
    return ""


def unresolved(command: Words) -> list[str]:
    """Files that a command names and that are not here."""
    named = [word for word in command if word.endswith((".py", ".json", ".yaml")) and not word.startswith("OUT/")]
    return [f"{word} is not here" for word in named if not (ROOT / word).exists()]


def unknown_options(command: Words) -> list[str]:
    """Options of a command of ours that its own help does not name."""
    words = list(itertools.takewhile(lambda word: not word.startswith(("--", "OUT")), command))
    said = help_of(tuple(words))
    options = {word for word in command if word.startswith("--") and word not in SGLANG_FLAGS}
    return [f"{' '.join(words[1:])} has no {option}" for option in sorted(options) if option not in said]


@functools.cache
def help_of(command: Words) -> str:
    return subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT).stdout


def play(command: Words, out: Path, log: Path, limit_s: float, environment: dict[str, str]) -> int | str:
    """Status of a command. At its limit it is asked to end, since a kill would leave its servers on the GPU."""
    words = [word.replace("OUT/", f"{out}/") for word in command]
    with log.open("ab") as file:
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "over the time limit"


def is_made(name: str, out: Path) -> bool:
    return (out / f"{name}.made").exists()


def prepare(name: str, out: Path, deadline_s: float) -> str | None:
    """Make what checks need where it is not there. Why it is not there in the end; empty where it is, None where too
    little time is left."""
    least_s, command = PREPARED[name]
    if is_made(name, out):
        return ""
    limit_s = min(PART_S, deadline_s - time.monotonic() - STOP_S)
    if limit_s < least_s:
        return None
    print(f"preparing {name}", flush=True)
    shutil.rmtree(out / name, ignore_errors=True)  # of a try that was cut off
    status = play(command, out, out / f"{name}.log", limit_s, PREPARING)
    if status != 0:
        return f"{name}: {status}, see {name}.log"
    (out / f"{name}.made").touch()
    return ""


def forget(command: Words, out: Path) -> None:
    """Remove what an earlier try of it left: its JSON, and its run directory, where a server would resume."""
    for option, word in itertools.pairwise(command):
        path = Path(word.replace("OUT", str(out), 1))
        if option == "--run-dir":
            shutil.rmtree(path, ignore_errors=True)
        elif word.startswith("OUT/") and word.endswith(".json"):
            path.unlink(missing_ok=True)


def run(check: Check, number: int, out: Path, deadline_s: float) -> dict[str, object] | None:
    """A row of the summary; None where too little time is left."""
    key = {"check": check.name, "part": number, "goal": check.goal}
    why: str | None = cannot(check, out)
    for name in check.needs:
        why = why or prepare(name, out, deadline_s)
        if why is None:
            return None
    if why:
        return {**key, "status": f"left out: {why}"}
    began_s = time.monotonic()
    limit_s = min(check.limit_s, deadline_s - began_s - STOP_S)
    if limit_s < MIN_PART_S:
        return None
    command = (*check.parts[number - 1], *(server_flags() if check.has_server else ()))
    if not check.goes_on:
        forget(command, out)
    status = play(command, out, out / f"{check.name}-{number}.log", limit_s, ENVIRONMENT)
    seconds = round(time.monotonic() - began_s, 1)
    return {**key, "status": status, "seconds": seconds, "command": " ".join(command)}


def run_all(checks: list[Check], out: Path, part: int | None, deadline_s: float) -> bool:
    """Every part that has not succeeded yet, whatever becomes of the one before. False where one has not."""
    summary = out / "summary.json"
    rows = (
        {(row["check"], row["part"]): row for row in json.loads(summary.read_text())["parts"]}
        if summary.exists()
        else {}
    )
    wanted = [(check, n) for check in checks for n in range(1, len(check.parts) + 1) if part in (None, n)]
    for check, number in wanted:
        key = check.name, number
        if part is None and key in rows and rows[key]["status"] == 0:
            continue
        row = run(check, number, out, deadline_s)
        if row is None:
            print(f"{check.name}, part {number}: too little time left; the same command goes on with it")
            break
        rows[key] = row
        print(json.dumps(row), flush=True)
        summary.write_text(json.dumps({**provenance(), "parts": list(rows.values())}, indent=1) + "\n")
    return all(rows.get((check.name, number), {}).get("status") == 0 for check, number in wanted)


def dry_run(checks: list[Check], out: Path) -> int:
    """Say what would run. 1 where a command names a file or an option that is not there."""
    missing = []
    for name, (least_s, command) in PREPARED.items():
        print(f"{name}, made where a check needs it and {least_s} s are left, at most {PART_S} s:\n  " + shown(command))
        missing += [f"{name}: {told}" for told in unresolved(command) + unknown_options(command)]
    for check in checks:
        why = cannot(check, out)
        print(f"\n{check.name}: {check.question}\n  goal: {check.goal}" + (f"\n  left out here: {why}" if why else ""))
        print(f"  needs: {', '.join(check.needs) or 'nothing made here'}")
        for number, command in enumerate(check.parts, 1):
            print(f"  part {number}, at most {check.limit_s} s: {shown(command)}")
        found = {told: None for command in check.parts for told in unresolved(command) + unknown_options(command)}
        missing += [f"{check.name}: {told}" for told in found]
    for line in missing:
        print(line)
    return 1 if missing else 0


def pack(out: Path, file: Path) -> None:
    """What was found, without the models: JSON, logs and plots."""
    with tarfile.open(file, "w:gz") as archive:
        for path in sorted({path for pattern in PACKED for path in out.glob(pattern)}):
            if path.relative_to(out).parts[0] not in PREPARED:
                archive.add(path, path.relative_to(out))


def boots_json(out: Path) -> Path:
    return out / f"{BOOTS}.json"


def shown(command: Words) -> str:
    return " ".join(command).replace(PYTHON, "python")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=[check.name for check in CHECKS])
    parser.add_argument("--part", type=int, help="only this one of each check, whatever became of it before")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="that may be spent here")
    parser.add_argument("--pack", type=Path, help="where an archive of the results goes at the end, .tgz")
    parser.add_argument("--dry-run", action="store_true", help="say what would run; fails where a file is missing")
    options = parser.parse_args()
    out = options.out.absolute()
    for line in lacking(out):
        print(f"cannot: {line}")
    wanted = [check for check in CHECKS if not options.only or check.name in options.only]
    if options.dry_run:
        return dry_run(wanted, out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        return 0 if run_all(wanted, out, options.part, time.monotonic() + options.seconds) else 1
    finally:
        if options.pack:
            pack(out, options.pack)


if __name__ == "__main__":
    sys.exit(main())
