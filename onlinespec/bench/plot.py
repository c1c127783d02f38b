"""A result of `bench accept` as a PNG: acceptance by position, and latencies."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from onlinespec.bench.result import Result
from onlinespec.bench.summary import Summary


def plot(result: Result, path: Path) -> None:
    """One line per cell, of all its domains together. Cells that were not reached are left out."""
    shown = [(cell.name, cell.rows[-1]) for cell in result.cells if cell.rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    for name, row in shown:
        _draw_positions(left, name, row)
    left.set(xlabel="draft position", ylabel="share of verify steps accepted up to here", ylim=(0, 1))
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_title("Acceptance by position, 95 % between conversations")
    _draw_latencies(right, [row for _, row in shown])
    right.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=7)
    right.invert_yaxis()
    right.set(xlabel="ms, p50 to p99", xscale="log")
    right.set_title("Latency")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_positions(axes: Axes, name: str, row: Summary) -> None:
    if row.accept_length is None:
        return
    positions = range(1, len(row.position_acceptance) + 1)
    bounds = [
        (share - (share if low is None else low), (share if high is None else high) - share)
        for share, (low, high) in zip(row.position_acceptance, row.position_intervals, strict=True)
    ]
    spread = [[max(0.0, down) for down, _ in bounds], [max(0.0, up) for _, up in bounds]]
    label = f"{name}: accept length {row.accept_length:.2f}"
    axes.errorbar(positions, row.position_acceptance, spread, marker="o", capsize=3, linewidth=1.5, label=label)


def _draw_latencies(axes: Axes, rows: list[Summary]) -> None:
    kinds = {
        "time to first token": ("ttft_p50_s", "ttft_p99_s", "tab:blue", -0.15),
        "between tokens": ("token_p50_s", "token_p99_s", "tab:orange", 0.15),
    }
    for label, (middle, tail, colour, shift) in kinds.items():
        found = [(i + shift, getattr(row, middle), getattr(row, tail)) for i, row in enumerate(rows)]
        found = [spot for spot in found if spot[1]]
        if not found:
            continue
        places, middles_s, tails_s = zip(*found, strict=True)
        middles_ms, tails_ms = [1000 * value for value in middles_s], [1000 * value for value in tails_s]
        axes.hlines(places, middles_ms, tails_ms, color=colour, linewidth=2)
        axes.plot(middles_ms, places, "o", color=colour, label=label)
