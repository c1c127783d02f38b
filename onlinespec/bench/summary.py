"""Counters of many answers as one row: the only place where an accept length is computed for people.

Accept length is token-weighted from counters: (verify steps + correct drafts) / verify steps. SGLang's own
`spec_accept_length` divides visible tokens by verify steps; that truncated figure stands beside it. Intervals are of
`bench.estimate`: they hold for other conversations of the same kind, not for another hour of the same machine.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
from rich.table import Table

from onlinespec.bench.client import Answer
from onlinespec.bench.estimate import Estimate, ratio, share


class Summary(msgspec.Struct, frozen=True):
    """One row of a table. Latencies in seconds; None where there was nothing to measure."""

    name: str
    num_requests: int
    num_failed: int
    num_output_tokens: int
    num_verify_steps: int
    num_correct_drafts: int
    accept_length: float | None
    accept_length_low: float | None
    """95 %, between conversations; None of fewer than two"""
    accept_length_high: float | None
    accept_length_truncated: float | None
    """visible tokens after the first per verify step"""
    position_acceptance: list[float]
    """share of verify steps that accepted the drafted token at position 1, 2, ..."""
    position_intervals: list[tuple[float | None, float | None]]
    """95 % of each, Wilson's on the effective number of steps"""
    tokens_per_s: float | None
    """output tokens over the wall time from the first request sent to the last chunk"""
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    gap_p50_s: float | None
    """between two chunks of a stream; a chunk is one verify step's tokens"""
    gap_p99_s: float | None
    token_p50_s: float | None
    """inter-token latency: a gap shared among the tokens it brought"""
    token_p99_s: float | None


def summarise(name: str, answers: Sequence[Answer]) -> Summary:
    """Add up a group of answers; failed ones are counted and otherwise left out."""
    good = [answer for answer in answers if not answer.error]
    steps = sum(answer.num_verify_steps for answer in good)
    tokens = sum(answer.num_output_tokens for answer in good)
    gaps = [gap for answer in good for _, gap in answer.gaps_s]
    token_gaps = [gap for answer in good for gap in answer.token_gaps_s]
    ttft = [answer.ttft_s for answer in good if answer.chunk_s]
    wall_s = max(answer.end_s for answer in good) - min(answer.sent_s for answer in good) if good else 0.0
    visible = sum(answer.num_output_tokens - 1 for answer in good if answer.num_verify_steps)
    counts = list(conversations(good).values())
    length = accept_length(counts) or Estimate(0.0)
    shares = position_acceptance([of_one.histogram for of_one in counts])
    return Summary(
        name=name,
        num_requests=len(answers),
        num_failed=len(answers) - len(good),
        num_output_tokens=tokens,
        num_verify_steps=steps,
        num_correct_drafts=sum(answer.num_correct_drafts for answer in good),
        accept_length=length.value if steps else None,
        accept_length_low=length.low,
        accept_length_high=length.high,
        accept_length_truncated=visible / steps if steps else None,
        position_acceptance=[found.value for found in shares],
        position_intervals=[(found.low, found.high) for found in shares],
        tokens_per_s=tokens / wall_s if wall_s > 0 else None,
        ttft_p50_s=percentile(ttft, 50),
        ttft_p99_s=percentile(ttft, 99),
        gap_p50_s=percentile(gaps, 50),
        gap_p99_s=percentile(gaps, 99),
        token_p50_s=percentile(token_gaps, 50),
        token_p99_s=percentile(token_gaps, 99),
    )


@dataclass
class Counts:
    """Of one conversation, all its turns together."""

    num_verify_steps: int = 0
    num_correct_drafts: int = 0
    histogram: list[int] = field(default_factory=list)


def conversations(answers: Iterable[Answer]) -> dict[int, Counts]:
    """Counters by the conversation's number; an answer of no numbered suite is one of its own, below 0."""
    found: dict[int, Counts] = {}
    for place, answer in enumerate(answers):
        number = answer.prompt.number
        counts = found.setdefault(number if number >= 0 else -1 - place, Counts())
        counts.num_verify_steps += answer.num_verify_steps
        counts.num_correct_drafts += answer.num_correct_drafts
        pairs = itertools.zip_longest(counts.histogram, answer.histogram, fillvalue=0)
        counts.histogram = [a + b for a, b in pairs]
    return found


def accept_length(counts: Sequence[Counts]) -> Estimate | None:
    """Token-weighted, with its interval; None where nothing was verified."""
    steps = [of_one.num_verify_steps for of_one in counts]
    found = ratio([of_one.num_verify_steps + of_one.num_correct_drafts for of_one in counts], steps)
    if found is None or found.low is None:
        return found
    return Estimate(found.value, max(1.0, found.low), found.high)  # every step emits one token at least


def position_acceptance(histograms: Sequence[Sequence[int]]) -> list[Estimate]:
    """Share of verify steps whose drafted token at position 1, 2, ... was accepted.

    histograms[i][j]: verify steps of conversation i with exactly j drafted tokens accepted.
    """
    steps = [sum(histogram) for histogram in histograms]
    depth = max(map(len, histograms), default=0)
    shares = (share([sum(histogram[j:]) for histogram in histograms], steps) for j in range(1, depth))
    return [found for found in shares if found is not None]


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Nearest-rank percentile; None of nothing."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def table(summaries: Sequence[Summary], title: str) -> Table:
    """A rich table, one row per summary."""
    result = Table(title=title)
    for heading in (
        "",
        "requests",
        "failed",
        "tokens",
        "accept length",
        "by position",
        "tokens/s",
        "TTFT p50/p99 ms",
        "gap p50/p99 ms",
        "per token p50/p99 ms",
    ):
        result.add_column(heading, justify="left" if not heading else "right")
    for row in summaries:
        result.add_row(
            row.name,
            str(row.num_requests),
            str(row.num_failed),
            str(row.num_output_tokens),
            _length(row),
            " ".join(f"{share:.2f}" for share in row.position_acceptance) or "-",
            _number(row.tokens_per_s, ".0f"),
            f"{_number(row.ttft_p50_s, '.0f', 1000)}/{_number(row.ttft_p99_s, '.0f', 1000)}",
            f"{_number(row.gap_p50_s, '.0f', 1000)}/{_number(row.gap_p99_s, '.0f', 1000)}",
            f"{_number(row.token_p50_s, '.1f', 1000)}/{_number(row.token_p99_s, '.1f', 1000)}",
        )
    return result


def _length(row: Summary) -> str:
    if row.accept_length is None or row.accept_length_low is None or row.accept_length_high is None:
        return _number(row.accept_length, ".2f")
    return f"{row.accept_length:.2f} ({row.accept_length_low:.2f}-{row.accept_length_high:.2f})"


def _number(value: float | None, spec: str, scale: float = 1) -> str:
    return "-" if value is None else format(value * scale, spec)
