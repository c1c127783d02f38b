"""`onlinespec bench stream`, live: the same prompts, phase after phase, through a server of each arm in turn.

All arms answer the same prompts in the same order with as many users and as many tokens at most. Greedy answers are
then the same, token for token, so arms differ in time alone. A phase is cut into windows of as many answers each, in
the order in which they ended: the w-th window of two arms is about the same prompts, and a ratio is over these pairs,
with the t interval of `interval.ratio_interval`. Neighbouring windows are not quite independent, and arms run minutes
apart: what the machine does meanwhile is in the ratio and not in its interval.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import msgspec
from rich.table import Table

from onlinespec.bench.client import Answer
from onlinespec.bench.interval import Interval, mean_interval, ratio_interval
from onlinespec.bench.summary import Summary, summarise

PARTS = ("whole", "last half")
REFERENCES = ("none", "frozen")


class LiveWindow(msgspec.Struct, frozen=True):
    """So many answers, one after another as they ended. seconds: since the last of the window before."""

    num_tokens: int
    num_verify_steps: int
    num_correct_drafts: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def accept_length(self) -> float:
        """1 where nothing was drafted."""
        return 1 + self.num_correct_drafts / self.num_verify_steps if self.num_verify_steps else 1.0


class LivePhase(msgspec.Struct, frozen=True):
    """One phase of one arm. requests: [sent, ended, tokens, verify steps, correct drafts], seconds since its start."""

    name: str
    summary: Summary
    windows: list[LiveWindow]
    requests: list[list[float]]


class LiveRow(msgspec.Struct, frozen=True):
    """One arm. error: why it is not complete; empty where it is. num_swaps: of the draft in service."""

    arm: str
    is_complete: bool
    error: str
    phases: list[LivePhase]
    num_swaps: int


def phase_of(name: str, answers: Sequence[Answer], window_requests: int) -> LivePhase:
    """What a phase's answers come to; failed ones are counted in the summary alone."""
    good = sorted((a for a in answers if not a.error and a.chunk_s), key=lambda answer: answer.chunk_s[-1])
    began_s = min((answer.sent_s for answer in good), default=0.0)
    windows, since_s = [], began_s
    for first in range(0, len(good) - window_requests + 1, window_requests):
        part = good[first : first + window_requests]
        windows.append(
            LiveWindow(
                num_tokens=sum(answer.num_output_tokens for answer in part),
                num_verify_steps=sum(answer.num_verify_steps for answer in part),
                num_correct_drafts=sum(answer.num_correct_drafts for answer in part),
                seconds=part[-1].chunk_s[-1] - since_s,
            )
        )
        since_s = part[-1].chunk_s[-1]
    requests = [
        [
            round(answer.sent_s - began_s, 4),
            round(answer.chunk_s[-1] - began_s, 4),
            *(answer.num_output_tokens, answer.num_verify_steps, answer.num_correct_drafts),
        ]
        for answer in good
    ]
    return LivePhase(name, summarise(name, answers), windows, requests)


class LiveLine(msgspec.Struct, frozen=True):
    """One arm in one part of one phase. Ratios are None against itself and where the other arm has no such windows."""

    phase: str
    part: str
    arm: str
    accept_length: Interval
    """mean over windows; 1 without speculation"""
    tokens_per_s: Interval
    over_none: Interval | None
    """tokens/s over those without speculation, paired by window"""
    over_frozen: Interval | None
    gain_over_frozen: Interval | None
    """accept length less that of the frozen draft, paired by window"""


def summarise_live(rows: Sequence[LiveRow]) -> list[LiveLine]:
    """Phase by phase, whole and last half, in the arms' order; incomplete arms as far as they came."""
    phases = list(dict.fromkeys(phase.name for row in rows for phase in row.phases))
    lines = []
    for name, part in itertools.product(phases, PARTS):
        windows = {row.arm: _part(phase.windows, part) for row in rows for phase in row.phases if phase.name == name}
        lines += [_line(name, part, arm, windows) for arm in windows if windows[arm]]
    return lines


def _part(windows: Sequence[LiveWindow], part: str) -> Sequence[LiveWindow]:
    return windows if part == "whole" else windows[len(windows) // 2 :]


def _line(phase: str, part: str, arm: str, windows: dict[str, Sequence[LiveWindow]]) -> LiveLine:
    own, frozen = windows[arm], windows.get("frozen", ())
    length, speed = mean_interval(w.accept_length for w in own), mean_interval(w.tokens_per_s for w in own)
    assert length is not None
    assert speed is not None
    is_frozen = arm == "frozen"
    return LiveLine(
        phase=phase,
        part=part,
        arm=arm,
        accept_length=length,
        tokens_per_s=speed,
        over_none=None if arm == "none" else _ratio(own, windows.get("none", ())),
        over_frozen=None if is_frozen else _ratio(own, frozen),
        gain_over_frozen=None
        if is_frozen or len(own) != len(frozen)
        else mean_interval(a.accept_length - b.accept_length for a, b in zip(own, frozen, strict=True)),
    )


def _ratio(own: Sequence[LiveWindow], other: Sequence[LiveWindow]) -> Interval | None:
    if len(own) != len(other):
        return None  # one of them was cut short: windows of the same number are not of the same prompts' half
    return ratio_interval([window.tokens_per_s for window in own], [window.tokens_per_s for window in other])


def table(lines: Sequence[LiveLine]) -> Table:
    result = Table(title="live stream; paired by window, t intervals of 95 %")
    for heading in ("phase", "arm", "accept length", "tokens/s", "over none", "over frozen"):
        result.add_column(heading, justify="left" if heading in ("phase", "arm") else "right")
    for line in lines:
        ratios: list[Any] = [line.over_none, line.over_frozen]
        result.add_row(
            f"{line.phase}, {line.part}",
            line.arm,
            str(line.accept_length),
            str(line.tokens_per_s),
            *("-" if ratio is None else str(ratio) for ratio in ratios),
        )
    return result
