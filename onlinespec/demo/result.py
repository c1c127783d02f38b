"""What the demo shows, computed once: phases by fifths, swaps, gaps, and the checks it must pass.

Accept lengths come from the server's counters through `bench.summary`, as `bench accept` has them. Answers
whose text occurred before are left out.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from onlinespec.bench.client import Answer
from onlinespec.bench.summary import Summary, summarise
from onlinespec.demo.traffic import Phase, Record
from onlinespec.versions.journal import AnyEvent, Judged, Promoted, RolledBack

SWAP_WINDOW_S = 0.25
FIRST_GOAL = 2.6
SHIFT_GOAL = 2.4
MIN_SWAPS = 3


@dataclass(frozen=True)
class Check:
    """One thing the demo must show."""

    text: str
    is_met: bool


class Result(msgspec.Struct, frozen=True):
    """The demo in numbers; written as JSON."""

    fifths: list[Summary]
    """first and last fifth of each phase by answers, named `phase first fifth`"""
    phases: list[Summary]
    repeats_frac: float
    """share of answers left out because their text occurred before"""
    num_failed: int
    promotions: int
    rollbacks: int
    verdicts: dict[str, int]
    dropped_rows: int
    """rows the tap dropped for want of room"""
    longest_gap_at_swap_s: float | None
    longest_gap_elsewhere_s: float | None
    seconds: float
    """from the server's being ready to the end"""
    holdout_frac: float
    candidate_steps: int


def fifth(records: Sequence[Record], phase: str, is_last: bool) -> list[Answer]:
    """Answers of the first or last fifth of a phase, repeats left out."""
    answers = [record.answer for record in records if record.phase == phase and not record.is_repeat]
    count = max(1, len(answers) // 5)
    return answers[-count:] if is_last else answers[:count]


def swap_times(events: Sequence[AnyEvent]) -> list[float]:
    """Wall-clock times of every change of the draft in service."""
    return [event.time_s for event in events if isinstance(event, Promoted | RolledBack)]


def longest_gaps(records: Sequence[Record], swaps: Sequence[float]) -> tuple[float | None, float | None]:
    """Longest pause inside a stream that touches a swap's window, and the longest that does not; seconds."""
    to_wall_s = time.time() - time.monotonic()
    at: list[float] = []
    elsewhere: list[float] = []
    for record in records:
        for end, gap in record.answer.gaps_s:
            end_s = end + to_wall_s
            is_at = any(end_s - gap - SWAP_WINDOW_S <= swap <= end_s + SWAP_WINDOW_S for swap in swaps)
            (at if is_at else elsewhere).append(gap)
    return max(at, default=None), max(elsewhere, default=None)


def build_result(
    phases: Sequence[Phase],
    records: Sequence[Record],
    events: Sequence[AnyEvent],
    *,
    dropped_rows: int,
    seconds: float,
    holdout_frac: float,
    candidate_steps: int,
) -> Result:
    at_swap, elsewhere = longest_gaps(records, swap_times(events))
    verdicts = [str(event.verdict["decision"]) for event in events if isinstance(event, Judged)]
    rows = [
        summarise(f"{phase.name} {'last' if is_last else 'first'} fifth", fifth(records, phase.name, is_last))
        for phase in phases
        for is_last in (False, True)
    ]
    return Result(
        fifths=rows,
        phases=[
            summarise(p.name, [r.answer for r in records if r.phase == p.name and not r.is_repeat]) for p in phases
        ],
        repeats_frac=sum(record.is_repeat for record in records) / max(1, len(records)),
        num_failed=sum(bool(record.answer.error) for record in records),
        promotions=sum(isinstance(event, Promoted) for event in events),
        rollbacks=sum(isinstance(event, RolledBack) for event in events),
        verdicts={decision: verdicts.count(decision) for decision in ("promote", "drop")},
        dropped_rows=dropped_rows,
        longest_gap_at_swap_s=at_swap,
        longest_gap_elsewhere_s=elsewhere,
        seconds=seconds,
        holdout_frac=holdout_frac,
        candidate_steps=candidate_steps,
    )


def checks(result: Result) -> list[Check]:
    """What the demo promises of its two learning phases."""
    start, learned, shifted, recovered = (row.accept_length or 0.0 for row in result.fifths[:4])
    return [
        Check(
            f"an untrained draft: accept length {start:.2f} in the first fifth, below its last", start < learned - 0.5
        ),
        Check(f"learned the first domain: {learned:.2f}, wanted {FIRST_GOAL}", learned >= FIRST_GOAL),
        Check(f"fell at the shift: {shifted:.2f}, wanted below {learned:.2f}", shifted < learned),
        Check(f"learned the new domain: {recovered:.2f}, wanted {SHIFT_GOAL}", recovered >= SHIFT_GOAL),
        Check(f"{result.promotions} promoted swaps, wanted {MIN_SWAPS}", result.promotions >= MIN_SWAPS),
        Check(f"{result.rollbacks} of 2 swaps by rollback and its undoing", result.rollbacks == 2),
        Check(f"{result.num_failed} failed requests, wanted 0", result.num_failed == 0),
    ]
