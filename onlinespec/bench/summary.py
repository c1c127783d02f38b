"""Counters of many answers as one row: the only place where an accept length is computed for people.

Accept length is token-weighted from counters: (verify steps + correct drafts) / verify steps. SGLang's own
`spec_accept_length` divides visible tokens by verify steps; that truncated figure stands beside it.
"""

import math
from collections.abc import Iterable, Sequence

import msgspec
from rich.table import Table

from onlinespec.bench.client import Answer


class Summary(msgspec.Struct, frozen=True):
    """One row of a table. Latencies in seconds; None where there was nothing to measure."""

    name: str
    num_requests: int
    num_failed: int
    num_output_tokens: int
    num_verify_steps: int
    num_correct_drafts: int
    accept_length: float | None
    accept_length_truncated: float | None
    """visible tokens after the first per verify step"""
    position_acceptance: list[float]
    """share of verify steps that accepted the drafted token at position 1, 2, ..."""
    tokens_per_s: float | None
    """output tokens over the wall time from the first request sent to the last chunk"""
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    gap_p50_s: float | None
    """between two chunks of a stream; a chunk is one verify step's tokens"""
    gap_p99_s: float | None


def summarise(name: str, answers: Sequence[Answer]) -> Summary:
    """Add up a group of answers; failed ones are counted and otherwise left out."""
    good = [answer for answer in answers if not answer.error]
    steps = sum(answer.num_verify_steps for answer in good)
    correct = sum(answer.num_correct_drafts for answer in good)
    tokens = sum(answer.num_output_tokens for answer in good)
    gaps = [gap for answer in good for _, gap in answer.gaps_s]
    ttft = [answer.ttft_s for answer in good if answer.chunk_s]
    ends = [answer.chunk_s[-1] for answer in good if answer.chunk_s]
    wall_s = max(ends) - min(answer.sent_s for answer in good) if ends else 0.0
    counted = [answer for answer in good if answer.num_verify_steps]
    visible = sum(answer.num_output_tokens - 1 for answer in counted)
    return Summary(
        name=name,
        num_requests=len(answers),
        num_failed=len(answers) - len(good),
        num_output_tokens=tokens,
        num_verify_steps=steps,
        num_correct_drafts=correct,
        accept_length=(steps + correct) / steps if steps else None,
        accept_length_truncated=visible / steps if steps else None,
        position_acceptance=position_acceptance(answer.histogram for answer in good),
        tokens_per_s=tokens / wall_s if wall_s > 0 else None,
        ttft_p50_s=percentile(ttft, 50),
        ttft_p99_s=percentile(ttft, 99),
        gap_p50_s=percentile(gaps, 50),
        gap_p99_s=percentile(gaps, 99),
    )


def position_acceptance(histograms: Iterable[Sequence[int]]) -> list[float]:
    """Share of verify steps whose drafted token at position 1, 2, ... was accepted.

    histograms[i][j]: verify steps of answer i with exactly j drafted tokens accepted.
    """
    totals: list[int] = []
    for histogram in histograms:
        totals.extend([0] * (len(histogram) - len(totals)))
        for j, count in enumerate(histogram):
            totals[j] += count
    steps = sum(totals)
    return [sum(totals[j:]) / steps for j in range(1, len(totals))] if steps else []


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
    ):
        result.add_column(heading, justify="left" if not heading else "right")
    for row in summaries:
        result.add_row(
            row.name,
            str(row.num_requests),
            str(row.num_failed),
            str(row.num_output_tokens),
            _number(row.accept_length, ".2f"),
            " ".join(f"{share:.2f}" for share in row.position_acceptance) or "-",
            _number(row.tokens_per_s, ".0f"),
            f"{_number(row.ttft_p50_s, '.0f', 1000)}/{_number(row.ttft_p99_s, '.0f', 1000)}",
            f"{_number(row.gap_p50_s, '.0f', 1000)}/{_number(row.gap_p99_s, '.0f', 1000)}",
        )
    return result


def _number(value: float | None, spec: str, scale: float = 1) -> str:
    return "-" if value is None else format(value * scale, spec)
