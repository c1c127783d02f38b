"""Figures with 95 % intervals, where conversations vary and the tokens of one conversation are alike.

The unit that was drawn is the conversation, so all spread is taken between conversations: counting verify steps as if
each were a draw of its own gives intervals that are too narrow. Ratios of sums are linearised: with r the ratio and
e_i = y_i - r x_i, Var(r) ~ n / (n - 1) sum(e_i^2) / sum(x_i)^2, and Student's t with n - 1 degrees (Cochran, Sampling
Techniques, 3rd ed. 1977, chapter 6). It wants some 20 conversations; with few of them it is too narrow.
"""

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95


class Estimate(msgspec.Struct, frozen=True):
    """A figure and its interval. low and high are None where fewer than two conversations say how it varies."""

    value: float
    low: float | None = None
    high: float | None = None


def ratio(parts: Sequence[float], wholes: Sequence[float]) -> Estimate | None:
    """sum(parts) / sum(wholes), one of each a conversation; None of nothing. Conversations without a whole say nothing.

    Source: Cochran, see above.
    """
    part_N, whole_N = _counted(parts, wholes)
    if not len(whole_N):
        return None
    value = float(part_N.sum() / whole_N.sum())
    return _interval(value, (part_N - value * whole_N) / whole_N.sum())


def ratio_difference(
    parts_a: Sequence[float], wholes_a: Sequence[float], parts_b: Sequence[float], wholes_b: Sequence[float]
) -> Estimate | None:
    """Ratio of b less that of a, the i-th of both the same conversation; None where either is of nothing.

    Source: the linearised ratios of `ratio`, subtracted conversation by conversation, so that what makes one of them
    easy for both cancels.
    """
    a_N, x_N, b_N, y_N = (np.asarray(values, dtype=float) for values in (parts_a, wholes_a, parts_b, wholes_b))
    if not (x_N.sum() > 0 and y_N.sum() > 0):
        return None
    a, b = float(a_N.sum() / x_N.sum()), float(b_N.sum() / y_N.sum())
    return _interval(b - a, (b_N - b * y_N) / y_N.sum() - (a_N - a * x_N) / x_N.sum())


def mean_ratio(logs: Sequence[float]) -> Estimate | None:
    """Geometric mean of ratios given by their logarithms, one a conversation; t interval on the logarithms."""
    found = ratio(logs, [1.0] * len(logs))
    if found is None:
        return None
    low, high = (None if bound is None else math.exp(bound) for bound in (found.low, found.high))
    return Estimate(math.exp(found.value), low, high)


def share(parts: Sequence[float], wholes: Sequence[float]) -> Estimate | None:
    """sum(parts) / sum(wholes) of trials that succeeded, with Wilson's interval on the effective number of trials.

    That number is p (1 - p) over the variance between conversations, at most the trials there were; where all trials
    or none succeeded that variance is unknown, and each conversation counts as one trial. Wilson's z is Student's t.
    Source: Korn and Graubard, Survey Methodology 24 (1998), for the effective number; Wilson, JASA 22 (1927).
    """
    _, whole_N = _counted(parts, wholes)
    found = ratio(parts, wholes)
    if found is None or found.low is None or found.high is None:
        return found
    p, t = found.value, float(stdtrit(len(whole_N) - 1, (1 + LEVEL) / 2))
    error = (found.high - found.low) / 2 / t
    trials = float(whole_N.sum())
    if p in (0.0, 1.0):
        trials = float(len(whole_N))
    elif error > 0:
        trials = min(trials, p * (1 - p) / error**2)
    centre = (p + t * t / (2 * trials)) / (1 + t * t / trials)
    half = t * math.sqrt(p * (1 - p) / trials + t * t / (4 * trials * trials)) / (1 + t * t / trials)
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))


def _counted(parts: Sequence[float], wholes: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    part_N, whole_N = np.asarray(parts, dtype=float), np.asarray(wholes, dtype=float)
    return part_N[whole_N > 0], whole_N[whole_N > 0]


def _interval(value: float, influence_N: np.ndarray) -> Estimate:
    """influence_N: how much each conversation moves the value; they add up to 0."""
    n = len(influence_N)
    if n < 2:
        return Estimate(value)
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * math.sqrt(n / (n - 1) * float((influence_N**2).sum()))
    return Estimate(value, value - half, value + half)
