"""Every table of `benchmarks/RESULTS.md` and `README.md` from the JSON in `benchmarks/results`.

    python benchmarks/bench_table.py            # writes both between their marker lines
    python benchmarks/bench_table.py --check    # changes nothing; status 1 where a document is not in step

A script's JSON has a section of its own in RESULTS.md, named as the file is (`SECTIONS`). What `onlinespec bench`
wrote says its kind itself: RESULTS.md gets a part per file, in order of name; README.md the newest live stream by arm,
the newest overhead in a sentence, and all acceptance runs in a table.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import tables_gate  # found by the line above
import tables_gpu
import tables_learning
import tables_server
from bench_parts import (
    DASH,
    markdown,
    overhead_part,
    overhead_readme,
    replay_part,
    stream_part,
    stream_readme,
)

from onlinespec.bench.result import Result, read_result
from onlinespec.bench.summary import Summary

ROOT = Path(__file__).parent.parent
BENCH = "bench"
SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": tables_server.demo,
    "gate": tables_gate.gate,
    "guard": tables_gate.guard,
    "battery": tables_gate.battery,
    "learning": tables_learning.learning,
    "bfloat16": tables_learning.bfloat16,
    "loss-change": tables_learning.loss_change,
    "trainer-step": tables_learning.trainer_step,
    "kv-modes": tables_learning.kv_modes,
    "drift": tables_learning.drift,
    "shadow-fidelity": tables_server.fidelity,
    "swap": tables_server.swap,
}
"""Name of a section of RESULTS.md and of the file it is made from -> the text of the file's content."""
LIVE, REPLAY, OVERHEAD, ACCEPT = "bench stream, live", "bench stream, replay", "bench overhead", "bench accept"
OTHER_PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    LIVE: stream_part,
    REPLAY: replay_part,
    OVERHEAD: overhead_part,
}
Found = dict[str, "Result | dict[str, Any]"]
"""by path from the root; a dict of another bench than accept"""


def results(root: Path) -> Found:
    """By path from the root."""
    found: Found = {}
    for path in sorted((root / "benchmarks" / "results").glob("*.json")):
        content = json.loads(path.read_bytes())
        kind = content.get("kind") if isinstance(content, dict) else None
        if kind == ACCEPT:
            found[path.relative_to(root).as_posix()] = read_result(path)
        elif kind in OTHER_PARTS:
            found[path.relative_to(root).as_posix()] = content
    return found


def accepts(found: Found) -> dict[str, Result]:
    return {name: result for name, result in found.items() if isinstance(result, Result)}


def newest(found: Found, kind: str) -> dict[str, Any] | None:
    of_kind = [result for result in found.values() if isinstance(result, dict) and result["kind"] == kind]
    return of_kind[-1] if of_kind else None


def results_part(found: Found) -> str:
    """For RESULTS.md: a part per file."""
    return "\n\n".join(
        _file_part(name, result)
        if isinstance(result, Result)
        else f"### `{name}`: {result['kind']}\n{OTHER_PARTS[result['kind']](result)}"
        for name, result in found.items()
    )


def _file_part(name: str, result: Result) -> str:
    commands = "\n".join(
        f"`{session.command}` ({session.time}, commit {session.commit})" for session in result.sessions
    )
    server = result.sessions[-1].server
    told = ", ".join(f"{key} {value}" for key, value in server.items() if value is not None) or "told nothing of itself"
    rows = [
        (
            cell.suite,
            row.name,
            str(cell.concurrency),
            f"{cell.temperature:g}",
            f"{row.num_requests - row.num_failed} of {row.num_requests}",
            _length(row),
            _number(row.accept_length_truncated, ".2f"),
            " ".join(f"{share:.2f}" for share in row.position_acceptance) or DASH,
            _number(row.tokens_per_s, ".0f"),
            f"{_number(row.ttft_p50_s, '.0f', 1000)} / {_number(row.ttft_p99_s, '.0f', 1000)}",
            f"{_number(row.token_p50_s, '.1f', 1000)} / {_number(row.token_p99_s, '.1f', 1000)}",
        )
        for cell in result.cells
        for row in cell.rows
    ]
    headings = (
        "suite",
        "domain",
        "users",
        "temperature",
        "requests",
        "accept length (95 %)",
        "truncated",
        "by position",
        "tokens/s",
        "TTFT p50 / p99 ms",
        "per token p50 / p99 ms",
    )
    return f"### `{name}`\n{commands}\n\nServer: {told}.\n\n{markdown(headings, rows)}"


def readme_part(found: Found) -> str:
    """For README.md."""
    parts = []
    if (live := newest(found, LIVE)) is not None:
        parts.append(stream_readme(live))
    if (overhead := newest(found, OVERHEAD)) is not None:
        parts.append(overhead_readme(overhead))
    rows = [
        (
            f"`{Path(name).name}`",
            cell.suite,
            str(cell.concurrency),
            f"{cell.temperature:g}",
            _length(cell.rows[-1]),
            _number(cell.rows[-1].tokens_per_s, ".0f"),
        )
        for name, result in accepts(found).items()
        for cell in result.cells
        if cell.rows
    ]
    if rows:
        parts.append(markdown(("result", "suite", "users", "temperature", "accept length (95 %)", "tokens/s"), rows))
    return "\n\n".join(parts)


def _length(row: Summary) -> str:
    if row.accept_length_low is None or row.accept_length_high is None:
        return _number(row.accept_length, ".2f")
    return f"{row.accept_length:.2f} ({row.accept_length_low:.2f} to {row.accept_length_high:.2f})"


def _number(value: float | None, spec: str, scale: float = 1) -> str:
    return DASH if value is None else format(value * scale, spec)


def parts_of(root: Path) -> dict[str, dict[str, str]]:
    """Document -> section -> what stands in it."""
    found, folder = results(root), root / "benchmarks" / "results"
    sections = {
        name: make(json.loads((folder / f"{name}.json").read_bytes()))
        for name, make in SECTIONS.items()
        if (folder / f"{name}.json").exists()
    }
    sections |= {"gpu": tables_gpu.gpu(folder), BENCH: results_part(found)}
    return {"benchmarks/RESULTS.md": sections, "README.md": {BENCH: readme_part(found)}}


def in_step(text: str, document: str, section: str, part: str) -> str:
    """The document with `part` between the section's marker lines.

    Raises: ValueError where it has not one pair of them.
    """
    begin, end = f"<!-- {section}:begin -->", f"<!-- {section}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{document}: wanted one line {begin} and one {end} behind it; put them where the table goes")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{part}\n{end}{after}"


def main(words: Sequence[str], root: Path = ROOT) -> int:
    """Exit status."""
    if list(words) not in ([], ["--check"]):
        raise SystemExit("usage: python benchmarks/bench_table.py [--check]")
    late = []
    for name, parts in parts_of(root).items():
        path = root / name
        wanted = path.read_text()
        for section, part in parts.items():
            wanted = in_step(wanted, name, section, part)
        if wanted != path.read_text():
            late.append(name)
            if not words:
                path.write_text(wanted)
    for name in late:
        print(f"{name}: " + ("is not in step; run python benchmarks/bench_table.py" if words else "written"))
    return 1 if words and late else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")
