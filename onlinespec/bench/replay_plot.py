"""The accept length of the draft in service over the stream, on the domain that came last: a panel per order."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from onlinespec.bench.replay import ReplayRow
from onlinespec.bench.replay_report import shift_of


def plot(rows: Sequence[ReplayRow], path: Path) -> None:
    """One line per seed, steps at the swaps; the oracle and 90 % of it; where that domain's first request came."""
    orders = list(dict.fromkeys(row.order for row in rows))
    colours = {arm: f"C{i}" for i, arm in enumerate(dict.fromkeys(row.arm for row in rows))}
    size = (6.5 * len(orders), 4.5)
    figure, panels = plt.subplots(1, len(orders), figsize=size, squeeze=False, constrained_layout=True)
    for order, axes in zip(orders, panels[0], strict=True):
        _panel(axes, [row for row in rows if row.order == order], colours)
        axes.set_title(order)
    panels[0][0].legend(loc="upper left", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _panel(axes: plt.Axes, rows: Sequence[ReplayRow], colours: dict[str, str]) -> None:
    shift = shift_of(rows[0])
    labelled: set[str] = set()
    for row in rows:
        tokens = [look.num_tokens / 1000 for look in row.looks] + [row.num_tokens / 1000]
        lengths = [look.accept_length[shift] for look in row.looks]
        label = None if row.arm in labelled else row.arm
        labelled.add(row.arm)
        colour = colours[row.arm]
        axes.step(tokens, [*lengths, lengths[-1]], where="post", label=label, color=colour, alpha=0.7, linewidth=1.2)
    oracle = rows[0].domains[shift].oracle
    for share in (1.0, 0.9):
        axes.axhline(share * oracle, color="black", linestyle=":", linewidth=0.8)
    begun = next(tokens for name, _, tokens in rows[0].begins if name == shift)
    axes.axvline(begun / 1000, color="grey", linewidth=0.8)
    axes.set(xlabel="answer tokens of the stream, thousands", ylabel=f"accept length on {shift}, draft in service")
    axes.grid(alpha=0.3)
