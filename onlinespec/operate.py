"""What an operator does to a server: look at it, and say what it serves. Works with the sidecar dead.

Every order is decided, carried out and written down under the journal's lock, and a second time it changes and
writes nothing. The sidecar follows the journal, so an order reaches it whenever it lives. Of a stopped server
the journal alone is changed, under the lock that a server holds: the next `serve` starts as it says.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from onlinespec.errors import StartError, SwapError, VersionError, WireError
from onlinespec.launch import Launch, holding, read_launch
from onlinespec.paths import RunPaths
from onlinespec.versions.journal import AnyEvent, Journal, Paused, Pinned, Promoted, Published, Resumed, Unpinned
from onlinespec.versions.state import JournalState, check_pin, rollback_from, state_of
from onlinespec.versions.store import VersionStore
from onlinespec.wire.messages import GetStatus, Status, Swap
from onlinespec.wire.sockets import ControlClient

_ANSWER_S = 10.0
_STALE_S = 10.0


@dataclass(frozen=True)
class _Desk:
    """One order's view of a run directory, under the journal's lock."""

    paths: RunPaths
    launch: Launch
    journal: Journal
    store: VersionStore
    state: JournalState
    served: int | None
    """version the server says it serves; None where it is stopped"""

    def has(self, version: int) -> bool:
        """Both the journal and the server say that this version is in service."""
        return self.state.incumbent == version and self.served in (None, version)

    def put(self, version: int) -> None:
        """Have the server serve a version; a stopped one will. Raises: see `promote`."""
        manifest = self.store.verify(version)
        target = self.state.target_digest or self.launch.target_digest
        if manifest.target_digest != target:
            raise VersionError(
                f"version {version} was trained for target {manifest.target_digest[:12]}, the server has target"
                f" {target[:12]}; name a version of this target, or serve that target in another run directory"
            )
        if version not in self.state.digests:
            # A crash kept it from the journal; who trains on from it looks there.
            published = Published(time_s=time.time(), version=version, digest=manifest.digest, parent=manifest.parent)
            self.journal.append(published)
        if self.served is None:
            return
        swap = Swap(version, str(self.paths.version(version)), manifest.digest)
        ack = ControlClient(self.paths.control_endpoint).acknowledged(swap)
        if not ack.is_ok:
            raise SwapError(f"the server refused version {version}: {ack.message}")

    def told(self, version: int) -> str:
        """The line that says what `put` did."""
        when = "is in service" if self.served is not None else "goes into service when the server starts again"
        was = "" if self.state.incumbent in (None, version) else f"; it was version {self.state.incumbent}"
        return f"version {version} {when}{was}"


@contextmanager
def _desk(root: Path) -> Iterator[_Desk]:
    """Raises: StartError where this is no run directory; WireError where its server lives and does not answer."""
    launch = read_launch(root)
    paths = RunPaths(root)
    journal = Journal(paths)
    with ExitStack() as held:
        served = None
        try:
            held.enter_context(holding(paths))
        except StartError:
            served = _status(paths).version
        held.enter_context(journal.decision())
        yield _Desk(paths, launch, journal, VersionStore(paths), state_of(journal.read()), served)


def _status(paths: RunPaths) -> Status:
    reply = ControlClient(paths.control_endpoint).request(GetStatus(), timeout_s=_ANSWER_S)
    if not isinstance(reply, Status):
        raise WireError(f"the server answered {type(reply).__name__}, wanted its Status")
    return reply


def promote(root: Path, version: int, reason: str = "") -> str:
    """Put a version in service and lift its bar; returns the line to show.

    Raises: StartError where this is no run directory; VersionError where the version is not there, is damaged,
    was trained for another target, or another one is pinned; WireError where the server does not answer;
    SwapError where it refuses.
    """
    with _desk(root) as desk:
        if desk.has(version):
            return f"version {version} is in service already; nothing was changed"
        check_pin(desk.state, version)
        _promote(desk, version, reason)
        return desk.told(version)


def _promote(desk: _Desk, version: int, reason: str) -> None:
    desk.put(version)
    was = desk.state.incumbent
    if was != version:
        event = Promoted(time_s=time.time(), version=version, from_version=was, by="operator", reason=reason)
        desk.journal.append(event)


def roll_back(root: Path, to: int | None, reason: str = "") -> str:
    """Put an earlier version in service and bar the weights that are left; returns the line to show.

    `to` None means the version that was in service before, so each such call goes one further back.

    Raises: as `promote`; VersionError also where there is nothing to return to.
    """
    with _desk(root) as desk:
        if to is not None and desk.has(to):
            return f"version {to} is in service already; nothing was changed"
        check_pin(desk.state, to)
        if to is not None and to == desk.state.incumbent:
            desk.put(to)
            return desk.told(to)
        event = rollback_from(desk.state, to, "operator", time.time(), reason)
        desk.put(event.to_version)
        desk.journal.append(event)
        barred = ", which the gate will not promote again" if event.barred_digest else ""
        return desk.told(event.to_version) + barred


def pin(root: Path, version: int, reason: str = "") -> str:
    """Keep a version in service, after putting it there; returns the line to show. Raises: as `promote`."""
    with _desk(root) as desk:
        check_pin(desk.state, version)
        is_pinned, is_served = desk.state.pinned == version, desk.has(version)
        if is_pinned and is_served:
            return f"version {version} is pinned already; nothing was changed"
        if not is_served:
            _promote(desk, version, reason)
        if not is_pinned:
            desk.journal.append(Pinned(time_s=time.time(), version=version, reason=reason))
        return f"{desk.told(version)}; it is pinned, and stays until `onlinespec unpin`"


def unpin(root: Path, reason: str = "") -> str:
    """Lift the pin; returns the line to show. Raises: StartError, VersionError."""
    with _order(root) as (journal, state):
        if state.pinned is None:
            return "no version is pinned; nothing was changed"
        journal.append(Unpinned(time_s=time.time(), version=state.pinned, reason=reason))
        return f"version {state.pinned} is no longer pinned"


def pause(root: Path, reason: str = "") -> str:
    """Have the gate start no race and promote nothing; returns the line to show. Raises: StartError, VersionError."""
    with _order(root) as (journal, state):
        if state.is_paused:
            return "the gate is paused already; nothing was changed"
        journal.append(Paused(time_s=time.time(), reason=reason))
        return "the gate is paused: no race starts and nothing is promoted until `onlinespec resume`"


def resume(root: Path, reason: str = "") -> str:
    """Have the gate work again; returns the line to show. Raises: StartError, VersionError."""
    with _order(root) as (journal, state):
        if not state.is_paused:
            return "the gate is not paused; nothing was changed"
        journal.append(Resumed(time_s=time.time(), reason=reason))
        return "the gate works again"


@contextmanager
def _order(root: Path) -> Iterator[tuple[Journal, JournalState]]:
    """For what the journal alone decides: the server is not asked."""
    read_launch(root)
    journal = Journal(RunPaths(root))
    with journal.decision():
        yield journal, state_of(journal.read())


def status_lines(root: Path) -> Iterator[str]:
    """Raises: StartError where this is no run directory; WireError where the server does not answer."""
    launch = read_launch(root)
    paths = RunPaths(root)
    reply = _status(paths)
    yield f"server    {launch.base_url}, target {launch.model}"
    yield f"draft     {_draft(reply)}, {reply.num_swaps} swaps since the server started"
    yield f"gate      {_gate(Journal(paths).read())}"
    share = "" if reply.sample_frac == 1 else f", {reply.sample_frac:.0%} of requests"
    capture = f"on{share}" if reply.capture else f"off {launch.capture_refused}".rstrip()
    yield f"capture   {capture}, fuse {reply.fuse} {reply.last_fault}".rstrip()
    counted = {name: count for name, count in sorted(reply.counters.items()) if not name.startswith("decode_")}
    yield "tap       " + (", ".join(f"{name} {count}" for name, count in counted.items()) or "no rows yet")
    yield from (f"steps     {line}" for line in _costs(reply.counters))
    try:
        sidecar = json.loads(paths.sidecar_status.read_bytes())
    except FileNotFoundError:
        yield "sidecar   has not reported yet"
        return
    age_s = time.time() - sidecar.pop("time_s")
    yield f"sidecar   reported {age_s:.0f} s ago" + ("; it may be dead, serve restarts it" if age_s > _STALE_S else "")
    for name, value in sidecar.items():
        if not name.startswith("server_"):  # what the server said above, and later
            yield f"  {name:<22}{_compact(value)}"


def _draft(reply: Status) -> str:
    depth = f"{reply.depth} draft steps" if reply.depth else "depth 0: nothing is drafted"
    trial = f", in turns with version {reply.switchback}, which is on trial" if reply.switchback else ""
    return f"version {reply.version}, {depth}{trial}"


def _costs(counters: Mapping[str, int]) -> Iterator[str]:
    """A line per draft depth: what a decode step cost and brought at each load (see `wire.messages.Heartbeat`)."""
    found: dict[int, list[tuple[int, str]]] = {}
    for name, steps in counters.items():
        if not (key := re.fullmatch(r"decode_steps_(d(\d+)_b(\d+))", name)):
            continue
        cost_ms = counters.get(f"decode_us_{key[1]}", 0) / steps / 1000
        length = counters.get(f"decode_tokens_{key[1]}", 0) / max(counters.get(f"decode_requests_{key[1]}", 0), 1)
        load = int(key[3])
        running = f"{load // 2 + 1} to {load}" if load > 2 else str(load)
        found.setdefault(int(key[2]), []).append((load, f"{cost_ms:.3g} ms, {length:.2f} tokens at {running} running"))
    for depth, loads in sorted(found.items()):
        yield f"depth {depth}: " + "; ".join(text for _, text in sorted(loads))


def _gate(events: tuple[AnyEvent, ...]) -> str:
    """What an operator holds it to, with the reasons given."""
    state = state_of(events)
    held = []
    if state.pinned is not None:
        reason = next(event.reason for event in reversed(events) if isinstance(event, Pinned))
        held.append(f"version {state.pinned} is pinned" + (f" ({reason})" if reason else ""))
    if state.is_paused:
        reason = next(event.reason for event in reversed(events) if isinstance(event, Paused))
        held.append("paused" + (f" ({reason})" if reason else ""))
    return ", ".join(held) or "on"


def _compact(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        texts = [(key, f"({_compact(one)})" if isinstance(one, dict) else _compact(one)) for key, one in value.items()]
        return ", ".join(f"{key} {text}" for key, text in texts) or "-"
    return "-" if value is None else str(value)
