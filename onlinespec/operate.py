"""What an operator does to a running server: look, and roll back. Works with the sidecar dead."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from onlinespec.errors import SwapError, WireError
from onlinespec.launch import read_launch
from onlinespec.paths import RunPaths
from onlinespec.versions.journal import (
    AnyEvent,
    Journal,
    Judged,
    Promoted,
    Published,
    RaceStarted,
    RolledBack,
    ServerStarted,
    SwapFailed,
    rollback_from,
    state_of,
)
from onlinespec.versions.store import VersionStore
from onlinespec.wire.messages import GetStatus, Status, Swap
from onlinespec.wire.sockets import ControlClient

_STALE_S = 10.0


def roll_back(root: Path, to: int | None) -> str:
    """Swap to an earlier version, then write it down; returns the line to show.

    Raises: StartError where this is no run directory; VersionError where there is nothing to return to, or
    it is damaged; WireError where the server does not answer; SwapError where it refuses.
    """
    read_launch(root)
    paths = RunPaths(root)
    journal, store = Journal(paths), VersionStore(paths)
    control = ControlClient(paths.control_endpoint)
    control.request(GetStatus(), timeout_s=10.0)
    with journal.decision():
        event = rollback_from(state_of(journal.read()), to, "operator", time.time())
        manifest = store.verify(event.to_version)
        ack = control.acknowledged(Swap(manifest.version, str(paths.version(manifest.version)), manifest.digest))
        if not ack.is_ok:
            raise SwapError(f"the server refused version {manifest.version}: {ack.message}")
        journal.append(event)
    barred = ", which the gate will not promote again" if event.barred_digest else ""
    return f"version {event.to_version} is in service; it was version {event.from_version}{barred}"


def status_lines(root: Path) -> Iterator[str]:
    """Raises: StartError where this is no run directory; WireError where the server does not answer."""
    launch = read_launch(root)
    paths = RunPaths(root)
    reply = ControlClient(paths.control_endpoint).request(GetStatus(), timeout_s=10.0)
    if not isinstance(reply, Status):
        raise WireError(f"the server answered {type(reply).__name__}, wanted its Status")
    yield f"server    {launch.base_url}, target {launch.model}"
    yield f"draft     version {reply.version}, {reply.num_swaps} swaps since the server started"
    share = "" if reply.sample_frac == 1 else f", {reply.sample_frac:.0%} of requests"
    capture = f"on{share}" if reply.capture else f"off {launch.capture_refused}".rstrip()
    yield f"capture   {capture}, fuse {reply.fuse} {reply.last_fault}".rstrip()
    yield "tap       " + (
        ", ".join(f"{name} {count}" for name, count in sorted(reply.counters.items())) or "no rows yet"
    )
    try:
        sidecar = json.loads(paths.sidecar_status.read_bytes())
    except FileNotFoundError:
        yield "sidecar   has not reported yet"
        return
    age_s = time.time() - sidecar.pop("time_s")
    yield f"sidecar   reported {age_s:.0f} s ago" + ("; it may be dead, serve restarts it" if age_s > _STALE_S else "")
    for name, value in sidecar.items():
        yield f"  {name:<22}{_compact(value)}"


def _compact(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_compact(item)}" for key, item in value.items()) or "-"
    return "-" if value is None else str(value)


def history_lines(root: Path) -> Iterator[str]:
    """One line per event, oldest first. Raises: StartError, VersionError."""
    read_launch(root)
    for event in Journal(RunPaths(root)).read():
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time_s))
        yield f"{when}  {_told(event)}"


def _told(event: AnyEvent) -> str:
    match event:
        case Published():
            return f"published   version {event.version}, weights {event.digest[:12]}"
        case RaceStarted():
            return f"candidate   {event.candidate_digest[:12]} at alpha {event.alpha:.4f}"
        case Judged():
            verdict = event.verdict
            evidence = f"{verdict['reason']} (e-value {verdict['e_value']:.3g})"
            return f"{verdict['decision']:<11} {event.candidate_digest[:12]}: {evidence}"
        case Promoted():
            return f"in service  version {event.version} instead of {event.from_version}, by the {event.by}"
        case RolledBack():
            return f"rolled back version {event.from_version} to {event.to_version}, by the {event.by}"
        case SwapFailed():
            return f"swap failed version {event.version}: {event.reason}"
        case ServerStarted():
            return f"started     on version {event.version}"
    return str(msgspec.to_builtins(event))
