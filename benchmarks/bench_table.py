"""Tables of `benchmarks/RESULTS.md` and `README.md` from the JSON that `onlinespec bench` wrote.

    python benchmarks/bench_table.py            # writes both between their marker lines
    python benchmarks/bench_table.py --check    # changes nothing; status 1 where a document is not in step

Every `benchmarks/results/*.json` that a bench of ours wrote is read, in order of name. RESULTS.md gets a part per file
with the command that made it; README.md the newest live stream by arm, the newest overhead in a sentence, and all
acceptance runs in a table.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from bench_parts import (  # found by the line above
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
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
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


PARTS: dict[str, Callable[[Found], str]] = {
    "benchmarks/RESULTS.md": results_part,
    "README.md": readme_part,
}


def in_step(text: str, name: str, part: str) -> str:
    """The document with `part` between its marker lines. Raises: ValueError where it has not one pair of them."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{name}: wanted one line {BEGIN} and one {END} behind it; put them where the table goes")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{part}\n{END}{after}"


def main(words: Sequence[str], root: Path = ROOT) -> int:
    """Exit status."""
    if list(words) not in ([], ["--check"]):
        raise SystemExit("usage: python benchmarks/bench_table.py [--check]")
    found, late = results(root), []
    for name, make in PARTS.items():
        path = root / name
        wanted = in_step(path.read_text(), name, make(found))
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
