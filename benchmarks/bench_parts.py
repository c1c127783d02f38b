"""What `bench_table` writes of the benches that have no server to ask again: stream, replay and overhead."""

from collections.abc import Sequence
from typing import Any

import msgspec

from onlinespec.bench.interval import Interval
from onlinespec.bench.overhead import Overhead
from onlinespec.bench.replay_report import OF_RECIPE, ReplayLine, recovery_cells
from onlinespec.bench.stream import LiveLine

DASH = "-"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows))


def told(interval: Interval | None) -> str:
    return DASH if interval is None else str(interval)


def spread(found: Sequence[float] | None, digits: int) -> str:
    """Of (middle, low, high); low is None where nothing was told of it."""
    if found is None:
        return DASH
    middle, low, high = found
    if low is None or low == middle == high:
        return f"{middle:,.{digits}f}"
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def made_by(result: dict[str, Any]) -> str:
    """The command, when, and of which commits; a file without a part for its provenance has it among the rest."""
    provenance = result.get("provenance", result)
    commits = sorted({row["commit"] for row in result.get("rows", []) if "commit" in row})
    at = f", rows of commit {' and '.join(commits)}" if commits else f", commit {provenance['commit']}"
    return f"`{provenance['command']}` ({provenance['time']}{at})"


def stream_part(result: dict[str, Any]) -> str:
    """A row per arm in each half of each phase."""
    settings = result["settings"]
    said = (
        f"{settings['num_users']} users, {settings['num_requests']} requests a phase, answers of at most"
        f" {settings['max_tokens']} tokens, windows of {settings['window_requests']} answers."
    )
    rows = [
        (
            f"{line.phase}, {line.part}",
            line.arm,
            told(line.accept_length),
            told(line.tokens_per_s),
            told(line.over_none),
            told(line.over_frozen),
            told(line.gain_over_frozen),
        )
        for line in live_lines(result)
    ]
    swaps = ", ".join(f"{row['arm']} {row['num_swaps']}" for row in result["rows"])
    headings = ("phase", "arm", "accept length", "tokens/s", "over none", "over frozen", "accept length over frozen")
    return f"{made_by(result)}\n\n{said} Swaps: {swaps}.\n\n{markdown(headings, rows)}"


def live_lines(result: dict[str, Any]) -> list[LiveLine]:
    return [msgspec.convert(line, LiveLine, strict=False) for line in result.get("summary", [])]


def stream_readme(result: dict[str, Any]) -> str:
    """A row per arm: the first phase and the last."""
    lines = {(line.arm, line.phase, line.part): line for line in live_lines(result)}
    phases = list(dict.fromkeys(phase for _, phase, _ in lines))
    first, last = phases[0], phases[-1]
    rows = []
    for arm in dict.fromkeys(arm for arm, _, _ in lines):
        found = [lines.get((arm, *at)) for at in ((first, "whole"), (last, "whole"), (last, "last half"))]
        cells = [
            (told(at.accept_length), told(at.over_none), told(at.over_frozen)) if at else (DASH,) * 3 for at in found
        ]
        rows.append((arm, cells[0][0], cells[0][1], cells[1][0], cells[1][1], cells[1][2], cells[2][0], cells[2][2]))
    names = (first.partition(":")[2] or first, last.partition(":")[2] or last)
    headings = (
        "arm",
        f"{names[0]}: accept length",
        "tokens/s over none",
        f"{names[1]}: accept length",
        "over none",
        "over frozen",
        "last half: accept length",
        "over frozen",
    )
    return markdown(headings, rows)


def replay_part(result: dict[str, Any]) -> str:
    """A row per arm and order; recovery at every level."""
    lines = [msgspec.convert(line, ReplayLine, strict=False) for line in result.get("summary", [])]
    levels = [recovery.level for recovery in lines[0].recoveries] if lines else []
    rows = [
        (
            line.order,
            line.arm,
            str(line.num_seeds),
            *recovery_cells(line.to_recipe, line.num_seeds),
            *(cell for recovery in line.recoveries for cell in recovery_cells(recovery, line.num_seeds)),
            f"{line.final} of {line.oracle:.3g}",
            told(line.regret_area),
            told(line.forgotten),
            f"{line.num_swaps_gained} of {line.num_swaps}",
            f"{line.training_cpu_s.mean:.0f}",
        )
        for line in lines
    ]
    reached = [cell for level in levels for cell in (f"to {level:.0%} of the oracle", "over the recipe's")]
    headings = (
        "order",
        "arm",
        "seeds",
        f"tokens to {OF_RECIPE:.0%} of the recipe's last",
        "over the recipe's",
        *reached,
        "final accept length",
        "regret",
        "forgotten",
        "swaps that gained",
        "CPU s",
    )
    tokens = result["settings"].get("tokens_per_domain") or result["settings"].get("num_tokens")
    return f"{made_by(result)}\n\n{tokens} answer tokens a domain.\n\n{markdown(headings, rows)}"


def overhead_part(result: dict[str, Any]) -> str:
    found = overhead_of(result)
    rows = [
        (f"{r.over} over {r.under}", str(r.tokens_per_s.num_values), str(r.tokens_per_s), str(r.gap_p99))
        for r in found.ratios
    ]
    dropped = ", ".join(f"{state} {frac:.2%}" for state, frac in found.dropped_frac.items() if frac is not None)
    said = (
        f"{result['settings']['num_users']} users; {found.bytes_per_row or 0:.0f} bytes a row; rows dropped: {dropped};"
        f" {found.optimizer_steps_per_s:.2f} optimizer steps/s in blocks with training."
    )
    return f"{made_by(result)}\n\n{said}\n\n{markdown(('', 'pairs', 'tokens/s', '99th percentile of gaps'), rows)}"


def overhead_readme(result: dict[str, Any]) -> str:
    """One sentence."""
    found = {(ratio.over, ratio.under): ratio for ratio in overhead_of(result).ratios}
    parts = [
        f"{words} {ratio.tokens_per_s} of the tokens/s and {ratio.gap_p99} of the 99th percentile between chunks"
        for key, words in ((("tap", "off"), "the tap leaves"), (("training", "off"), "tap and training"))
        if (ratio := found.get(key))
    ]
    return f"Of a server with neither, {'; '.join(parts)} ({result['settings']['num_users']} users, two cores, no GPU)."


def overhead_of(result: dict[str, Any]) -> Overhead:
    return msgspec.convert(result["summary"], Overhead, strict=False)
