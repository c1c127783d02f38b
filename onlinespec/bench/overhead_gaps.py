"""Gaps between a stream's tokens at certain times, a swap's say, against those away from them.

A gap is the time between two chunks of a stream (a chunk is what a verify step committed); it is at a window where it
meets it. In decode steps: over the median gap of that load. How unusual the gaps at the windows are: all windows are
moved together along the recording, round its end, to random places, and the longest gap and the mean over windows of
the longest gap are taken there; told is the share of places where they are at least as long.

G gaps.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

NUM_PLACES = 5000
BIN_S = 0.002
QUANTILES = (0.5, 0.9, 0.99, 1.0)

Window = tuple[float, float]
"""begin and end on the monotonic clock, which all processes of a machine share"""


def gaps_of(answers: Sequence[Sequence[float]], span: Window) -> np.ndarray:
    """Begin and end of every gap within the span. answers: the times of each one's chunks. Shapes: [G, 2]."""
    pairs = [pair for chunk_s in answers for pair in itertools.pairwise(chunk_s)]
    gaps = np.array(pairs).reshape(-1, 2)
    return gaps[(gaps[:, 0] >= span[0]) & (gaps[:, 1] <= span[1])]


def compare(gaps: np.ndarray, windows: Sequence[Window], span: Window) -> dict[str, Any]:
    """Gaps that meet a window against all others, in ms and decode steps. Shapes: gaps [G, 2], at least one."""
    length_s = gaps[:, 1] - gaps[:, 0]
    is_at = np.zeros(len(gaps), dtype=bool)
    for began_s, ended_s in windows:
        is_at |= (gaps[:, 1] >= began_s) & (gaps[:, 0] <= ended_s)
    step_s = float(np.median(length_s))
    longest, mean, num_met = places(gaps, windows, span)
    return {
        "windows": len(windows),
        "windows_met": num_met,
        "step_ms": round(1e3 * step_s, 2),
        "at": figures(length_s[is_at], step_s),
        "away": figures(length_s[~is_at], step_s),
        "share_of_places_with_as_long_a_longest_gap": longest,
        "share_of_places_with_as_long_a_mean_of_longest_gaps": mean,
    }


def figures(length_s: np.ndarray, step_s: float) -> dict[str, Any]:
    """Quantiles of these gaps; their number alone where there is none. Shapes: [G]."""
    if not len(length_s):
        return {"gaps": 0}
    found = np.quantile(length_s, QUANTILES)
    names = ["median", "90 %", "99 %", "longest"]
    return {
        "gaps": len(length_s),
        "ms": {name: round(1e3 * float(value), 1) for name, value in zip(names, found, strict=True)},
        "decode_steps": {name: round(float(value) / step_s, 2) for name, value in zip(names, found, strict=True)},
    }


def places(gaps: np.ndarray, windows: Sequence[Window], span: Window) -> tuple[float, float, int]:
    """See the module's docstring: share for the longest gap, for the mean of longest ones; windows that meet a gap."""
    num_bins = int((span[1] - span[0]) / BIN_S) + 1
    longest = np.zeros(num_bins)
    for began_s, ended_s in gaps:
        first, last = int((began_s - span[0]) / BIN_S), int((ended_s - span[0]) / BIN_S) + 1
        np.maximum(longest[first:last], ended_s - began_s, out=longest[first:last])
    bins = [np.arange(int((a - span[0]) / BIN_S), int((b - span[0]) / BIN_S) + 1) for a, b in windows]

    def at(offset: int) -> np.ndarray:
        return np.array([longest[(own + offset) % num_bins].max() for own in bins])

    here, rng = at(0), np.random.default_rng(1)
    there = [at(int(offset)) for offset in rng.integers(1, num_bins, NUM_PLACES)]
    share_longest = np.mean([found.max() >= here.max() for found in there])
    share_mean = np.mean([found.mean() >= here.mean() for found in there])
    return round(float(share_longest), 4), round(float(share_mean), 4), int((here > 0).sum())
