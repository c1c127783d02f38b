"""The journal: what was published, judged, promoted and rolled back, and the state that follows from it.

One JSON object a line, appended in a single write under a lock and flushed before `append` returns. An
event exists once its newline is on disk: a crash leaves at most one unterminated line, which readers skip
and the next append cuts off. Any other line that does not decode is damage and is named, never skipped.
The file is the only state: a restart folds it.
"""

import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import msgspec

from onlinespec.errors import VersionError
from onlinespec.paths import RunPaths
from onlinespec.versions.durable import sync_path

By = Literal["gate", "guard", "operator"]


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """Something that happened to this run directory."""

    time_s: float
    """wall clock"""


class Published(Event, frozen=True, kw_only=True, tag="published"):
    """A version is in the store. Written before the version is offered to a server."""

    version: int
    digest: str


class RaceStarted(Event, frozen=True, kw_only=True, tag="race_started"):
    """The gate began to judge a candidate, and has spent its level whatever becomes of the race."""

    candidate_digest: str
    alpha: float


class Judged(Event, frozen=True, kw_only=True, tag="judged"):
    """The gate reached a verdict."""

    candidate_digest: str
    verdict: dict[str, Any]


class Promoted(Event, frozen=True, kw_only=True, tag="promoted"):
    """The server acknowledged that it serves a new version."""

    version: int
    from_version: int | None
    """None where nothing of this store was in service"""
    by: By


class RolledBack(Event, frozen=True, kw_only=True, tag="rolled_back"):
    """The server acknowledged that it serves an earlier version again, or one an operator asked for."""

    from_version: int
    to_version: int
    by: By
    barred_digest: str | None
    """weights that no gate may promote again; None where the step bars nothing"""


class SwapFailed(Event, frozen=True, kw_only=True, tag="swap_failed"):
    """The server refused a version and serves what it served."""

    version: int
    reason: str


class ServerStarted(Event, frozen=True, kw_only=True, tag="server_started"):
    """A server came up with this version."""

    version: int


AnyEvent = Published | RaceStarted | Judged | Promoted | RolledBack | SwapFailed | ServerStarted

_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)


class JournalState(msgspec.Struct, frozen=True, kw_only=True):
    """What a restart resumes from."""

    incumbent: int | None = None
    """version in service; None before the first server came up"""
    previous: int | None = None
    """version a plain rollback returns to; None where there is none that is not barred"""
    barred: frozenset[str] = frozenset()
    """digests of weights that were rolled back"""
    num_promotions: int = 0
    """promotions the gate decided: what its error budget counts"""
    num_candidates: int = 0
    """races begun, those a crash cut short included"""
    digests: dict[int, str] = {}
    """digest of every version ever published"""


class Journal:
    """The journal file of one run directory; any process may read it or append to it."""

    def __init__(self, paths: RunPaths):
        self._path = paths.journal

    @contextmanager
    def decision(self) -> Iterator[None]:
        """Hold while reading the state, asking the server for a swap and writing it down: one decider at a time."""
        descriptor = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def append(self, event: AnyEvent) -> None:
        """Add one event; it is durable when this returns.

        Raises: VersionError where the disk refuses; the journal is then as before.
        """
        line = msgspec.json.encode(event) + b"\n"
        is_new = not self._path.exists()
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                _write_whole(descriptor, line)
            finally:
                os.close(descriptor)
            if is_new:
                sync_path(self._path.parent)
        except OSError as error:
            raise VersionError(f"{self._path}: cannot be written ({error}); check the disk") from error

    def read(self) -> tuple[AnyEvent, ...]:
        """Every event, oldest first; none where there is no journal yet.

        Raises: VersionError naming the line that does not decode.
        """
        if not self._path.exists():
            return ()
        # What follows the last newline is an append that a crash cut short, or one still under way.
        lines = self._path.read_bytes().split(b"\n")[:-1]
        return tuple(self._decode(line, number) for number, line in enumerate(lines, start=1))

    def _decode(self, line: bytes, number: int) -> AnyEvent:
        try:
            return _decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise VersionError(
                f"{self._path} line {number}: no event ({error}); restore it or use a new run directory"
            ) from error


def state_of(events: Iterable[AnyEvent]) -> JournalState:
    """Fold events, oldest first, into the state they leave."""
    served: list[int] = []
    digests: dict[int, str] = {}
    barred: set[str] = set()
    num_promotions = num_candidates = 0
    racing: str | None = None
    for event in events:
        match event:
            case Published():
                digests[event.version] = event.digest
            case RaceStarted():
                num_candidates += 1
                racing = event.candidate_digest
            case Judged():
                num_candidates += event.candidate_digest != racing
                racing = None
            case Promoted():
                num_promotions += event.by == "gate"
                _serve(served, event.version)
            case RolledBack():
                _roll_back(served, event.to_version)
                barred |= {event.barred_digest} if event.barred_digest else set()
                barred -= {digests.get(event.to_version, "")} if event.by == "operator" else set()
            case ServerStarted():
                _serve(served, event.version)
            case SwapFailed():
                pass
    earlier = [version for version in served[:-1] if digests.get(version) not in barred]
    return JournalState(
        incumbent=served[-1] if served else None,
        previous=earlier[-1] if earlier else None,
        barred=frozenset(barred),
        num_promotions=num_promotions,
        num_candidates=num_candidates,
        digests=digests,
    )


def rollback_from(state: JournalState, to_version: int | None, by: By, time_s: float) -> RolledBack:
    """Build the event of a rollback: where it goes, and what it bars.

    `to_version` None means the version before the incumbent. Going back bars the weights that are left;
    going forward, to a higher number, bars nothing, and so does leaving a version whose `Published` a crash
    kept from the journal. An operator's word outranks the gate: the version an
    operator names is un-barred by it.

    Raises: VersionError where there is nothing to leave or to return to.
    """
    if state.incumbent is None:
        raise VersionError("no version is in service: nothing to roll back; start the server first")
    to = state.previous if to_version is None else to_version
    if to is None:
        raise VersionError(
            f"nothing was in service before version {state.incumbent}; name a version with rollback --to N"
        )
    if to == state.incumbent:
        raise VersionError(f"version {to} is already in service; name another with rollback --to N")
    barred = state.digests.get(state.incumbent) if to < state.incumbent else None
    return RolledBack(time_s=time_s, from_version=state.incumbent, to_version=to, by=by, barred_digest=barred)


def _serve(served: list[int], version: int) -> None:
    if not served or served[-1] != version:
        served.append(version)


def _roll_back(served: list[int], version: int) -> None:
    """Forget what came after `version`; one that was never in service is entered on top."""
    if version in served:
        del served[len(served) - served[::-1].index(version) :]
    else:
        served.append(version)


def _write_whole(descriptor: int, line: bytes) -> None:
    """Write and flush a line, or leave the file as it was."""
    size = _cut_torn_tail(descriptor)
    try:
        num_written = os.write(descriptor, line)
        if num_written < len(line):
            raise OSError(errno.ENOSPC, f"only {num_written} of {len(line)} bytes fit")
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _cut_torn_tail(descriptor: int) -> int:
    """Drop what follows the last newline; return the size that is left, in bytes."""
    size = os.fstat(descriptor).st_size
    end = size
    while end > 0:
        start = max(end - 4096, 0)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)
    return end
