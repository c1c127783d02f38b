"""The journal as a person reads it: one line per event, and the same events as JSON lines."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from onlinespec.launch import read_launch
from onlinespec.paths import RunPaths
from onlinespec.versions.journal import (
    AnyEvent,
    CanaryEnded,
    DepthChanged,
    GuardTripped,
    Journal,
    Judged,
    Paused,
    Pinned,
    PrefixesRenewed,
    Promoted,
    Published,
    RaceStarted,
    Resumed,
    RolledBack,
    ServerStarted,
    SwapFailed,
    TargetChanged,
    Unpinned,
    Withheld,
)

_SHOWN = 12
"""characters of a digest"""


def history_lines(root: Path) -> Iterator[str]:
    """One line per event, oldest first. Raises: StartError, VersionError."""
    read_launch(root)
    for event in Journal(RunPaths(root)).read():
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time_s))
        what, told = _told(event)
        yield f"{when}  {what:<15}{told}"


def history_json(root: Path) -> Iterator[str]:
    """The journal's events as JSON objects, oldest first; times are seconds of the epoch. Raises: as above."""
    read_launch(root)
    for event in Journal(RunPaths(root)).read():
        yield msgspec.json.encode(event).decode()


def _told(event: AnyEvent) -> tuple[str, str]:
    """What happened in one or two words, and the rest of the line."""
    match event:
        case Published():
            parent = "" if event.parent is None else f", trained from version {event.parent}"
            return "published", f"version {event.version}, weights {event.digest[:_SHOWN]}{parent}"
        case RaceStarted():
            return "candidate", f"{_candidate(event)} at alpha {event.alpha:.4f}"
        case Judged():
            return f"gate: {event.verdict.get('decision')}", _judgement(event)
        case Withheld():
            return "withheld", f"{event.candidate_digest[:_SHOWN]} was not promoted: {event.reason}"
        case Promoted():
            was = "" if event.from_version is None else f" instead of {event.from_version}"
            return "in service", f"version {event.version}{was}, by the {event.by}{_because(event.reason)}"
        case RolledBack():
            return "rolled back", _rollback(event)
        case SwapFailed():
            return "swap failed", f"version {event.version}{_because(event.reason)}"
        case ServerStarted():
            return "started", f"on version {event.version}"
        case CanaryEnded():
            told = event.evidence.get("reason") or "; ".join(_shown(event.evidence))
            return "canary", f"version {event.version}: {event.decision}{_because(told)}"
        case GuardTripped():
            return (
                "guard",
                f"version {event.version}: {'; '.join([f'harm ({event.detector})', *_shown(event.evidence)])}",
            )
        case PrefixesRenewed():
            lag = f"live accept length {event.lag_tokens:+.3f} tokens from the shadow's on older drafts' KV"
            return "prefixes", f"computed anew for version {event.version}: {lag}"
        case DepthChanged():
            return "depth", f"{event.num_steps} draft steps, by the {event.by}{_because(event.reason)}"
        case TargetChanged():
            digests = f"{event.from_digest[:_SHOWN]} to {event.to_digest[:_SHOWN]}"
            return "target changed", f"{digests}; what was shown before counts no more"
    return _order(event)


def _order(event: Pinned | Unpinned | Paused | Resumed) -> tuple[str, str]:
    by = f"by the {event.by}{_because(event.reason)}"
    match event:
        case Pinned():
            return "pinned", f"version {event.version}, {by}"
        case Unpinned():
            return "unpinned", f"version {event.version}, {by}"
        case Paused():
            return "paused", f"the gate, {by}"
        case Resumed():
            return "resumed", f"the gate, {by}"


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""


def _candidate(event: RaceStarted | Judged) -> str:
    return event.candidate_digest[:_SHOWN] + (f" ({event.source})" if event.source else "")


def _judgement(event: Judged) -> str:
    return f"{_candidate(event)}{_because('; '.join(_evidence(event.verdict)))}"


def _evidence(found: dict[str, Any]) -> Iterator[str]:
    """The parts of the evidence that are there: other versions of the gate write other ones."""
    if "mean_gain_tokens" in found:
        yield f"gain {found['mean_gain_tokens']:+.3f} tokens over {found.get('num_requests')} requests"
    if "e_value" in found:
        wanted = f" of {found['threshold']:.3g} wanted" if "threshold" in found else ""
        yield f"e-value {found['e_value']:.3g}{wanted}"
    if "accept_length_candidate" in found and "accept_length_incumbent" in found:
        yield f"accept length {found['accept_length_incumbent']:.2f} -> {found['accept_length_candidate']:.2f}"
    if found.get("reason"):
        yield str(found["reason"])


def _shown(found: dict[str, Any]) -> Iterator[str]:
    """The evidence of a live test that a person wants at once; the rest is in the JSON."""
    if "mean_difference_tokens" in found:
        yield f"difference {found['mean_difference_tokens']:+.3f} tokens over {found.get('num_pairs')} pairs"
    if "step_cost_ratio" in found:
        yield f"step cost x {found['step_cost_ratio']:.3f}"
    if "mean_tokens" in found:
        yield f"difference {found['mean_tokens']:+.3f} tokens over {found.get('num_requests')} requests"
    if "evidence" in found and "threshold" in found:
        yield f"evidence {found['evidence']:.3g} of {found['threshold']:.3g} wanted"
    if found.get("reason"):
        yield str(found["reason"])


def _rollback(event: RolledBack) -> str:
    barred = f", weights {event.barred_digest[:_SHOWN]} barred" if event.barred_digest else ""
    return f"version {event.from_version} to {event.to_version}{barred}, by {_whom(event.by)}{_because(event.reason)}"


def _whom(by: str) -> str:
    return "`serve` at its start" if by == "serve" else f"the {by}"
