"""Accept length over requests, with the swaps marked, as a PNG."""

import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from onlinespec.demo.traffic import Record
from onlinespec.versions.journal import AnyEvent, Promoted, RolledBack

WINDOW_REQUESTS = 16


def rolling_accept_length(records: Sequence[Record]) -> list[float]:
    """Token-weighted accept length over the last WINDOW_REQUESTS answers, for each answer."""
    values = []
    for end in range(1, len(records) + 1):
        window = [record.answer for record in records[max(0, end - WINDOW_REQUESTS) : end]]
        steps = sum(answer.num_verify_steps for answer in window)
        values.append((steps + sum(answer.num_correct_drafts for answer in window)) / max(1, steps))
    return values


def plot(records: Sequence[Record], events: Sequence[AnyEvent], max_accept_length: int, path: Path) -> None:
    """Draw it. Repeated and failed answers are left out, as in the summary."""
    shown = [record for record in records if not record.is_repeat and record.answer.chunk_s]
    to_wall_s = time.time() - time.monotonic()
    ends_s = [record.answer.chunk_s[-1] + to_wall_s for record in shown]
    figure, axes = plt.subplots(figsize=(10, 4.5), constrained_layout=True)
    values = rolling_accept_length(shown)
    for name in dict.fromkeys(record.phase for record in shown):
        places = [i for i, record in enumerate(shown) if record.phase == name]
        axes.plot(places, [values[i] for i in places], label=f"{name} traffic", linewidth=1.8)
    styles = {"promoted": ("tab:green", "-"), "rolled back": ("tab:red", "--"), "undone": ("tab:purple", "--")}
    labelled: set[str] = set()
    for event in events:
        kind = _kind(event)
        if kind:
            colour, line = styles[kind]
            place = sum(end_s <= event.time_s for end_s in ends_s) - 0.5
            axes.axvline(
                place, color=colour, linestyle=line, linewidth=0.9, alpha=0.8, label=None if kind in labelled else kind
            )
            labelled.add(kind)
    axes.set(
        xlabel="request", ylabel=f"accept length, mean of {WINDOW_REQUESTS} requests", ylim=(0.9, max_accept_length)
    )
    axes.set_title("A draft that learns from the server's own traffic")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=8, ncols=4)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _kind(event: AnyEvent) -> str | None:
    match event:
        case Promoted():
            return "promoted"
        case RolledBack():
            return "rolled back" if event.to_version < event.from_version else "undone"
    return None
