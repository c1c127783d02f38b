"""The intervals that benches report: of a mean and of a ratio, over pairs or seeds. Pure.

Both rest on Student's t: the values are taken for independent and their mean for normal. Neighbouring windows of one
run share a machine's mood, so an interval over them is somewhat too narrow; one over seeds is not.
"""

import math
import statistics
from collections.abc import Iterable, Sequence

import msgspec
from scipy.special import stdtrit

LEVEL = 0.95


class Interval(msgspec.Struct, frozen=True):
    """A mean with its interval of 95 %. low, high: None below two values, which say nothing of their spread."""

    mean: float
    low: float | None
    high: float | None
    num_values: int

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:.3g}"
        return f"{self.mean:.3g} ({self.low:.3g} to {self.high:.3g})"


def t_quantile(level: float, freedom: int) -> float:
    """The t with P(|T| <= t) = level. freedom: degrees of freedom, at least 1."""
    return float(stdtrit(freedom, (1 + level) / 2))


def mean_interval(values: Iterable[float]) -> Interval | None:
    """t interval of the mean; None of nothing."""
    found = list(values)
    if not found:
        return None
    mean = statistics.fmean(found)
    if len(found) < 2:
        return Interval(mean, None, None, len(found))
    half = t_quantile(LEVEL, len(found) - 1) * statistics.stdev(found) / math.sqrt(len(found))
    return Interval(mean, mean - half, mean + half, len(found))


def ratio_interval(over: Sequence[float], under: Sequence[float]) -> Interval | None:
    """Geometric mean of the paired ratios over[i] / under[i], and its interval; None of nothing. All values above 0.

    t interval of the mean log ratio, raised again. A ratio and its inverse then have the same interval, turned round,
    which the mean of plain ratios has not. Source: Fleming and Wallace 1986, "How not to lie with statistics: the
    correct way to summarize benchmark results", CACM 29(3), for the geometric mean.
    """
    logs = mean_interval(math.log(a / b) for a, b in zip(over, under, strict=True))
    if logs is None or logs.low is None or logs.high is None:
        return logs and Interval(math.exp(logs.mean), None, None, logs.num_values)
    return Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high), logs.num_values)
