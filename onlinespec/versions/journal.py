"""The journal: what was published, judged, promoted, rolled back and ordered; `state` folds it.

One JSON object a line, appended in a single write under a lock and flushed before `append` returns. An
event exists once its newline is on disk: a crash leaves at most one unterminated line, which readers skip
and the next append cuts off. Any other line that does not decode is damage and is named, never skipped.
The file is the only state: a restart folds it.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import msgspec

from onlinespec.errors import VersionError
from onlinespec.paths import RunPaths
from onlinespec.versions.durable import sync_path

By = Literal["gate", "guard", "operator", "serve"]
"""who put a version in service; serve: at its start, for want of an undamaged incumbent"""


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """Something that happened to this run directory."""

    time_s: float
    """wall clock"""


class Published(Event, frozen=True, kw_only=True, tag="published"):
    """A version is in the store. Written before the version is offered to a server."""

    version: int
    digest: str
    parent: int | None = None
    """version the training went on from; None for a draft that came from outside"""


class RaceStarted(Event, frozen=True, kw_only=True, tag="race_started"):
    """The gate began to judge a candidate, and has spent its level whatever becomes of the race."""

    candidate_digest: str
    alpha: float
    source: str = ""
    """name of a draft that was offered; empty for the trainer's own"""


class Judged(Event, frozen=True, kw_only=True, tag="judged"):
    """The gate reached a verdict."""

    candidate_digest: str
    """of a file that could not be read, of its bytes as they were offered"""
    verdict: dict[str, Any]
    """gate.verdict.Verdict; of a candidate refused without a race its decision, stage (sound) and reason alone"""
    source: str = ""
    """name of a draft that was offered; empty for the trainer's own"""


class Withheld(Event, frozen=True, kw_only=True, tag="withheld"):
    """The gate's verdict was to promote, and something else forbade it: a pin, a pause, a bar, another's hand."""

    candidate_digest: str
    reason: str


class Promoted(Event, frozen=True, kw_only=True, tag="promoted"):
    """The server acknowledged that it serves a new version, or one an operator named; of a stopped server: it will."""

    version: int
    from_version: int | None
    """None where nothing of this store was in service"""
    by: By
    reason: str = ""
    """an operator's own words; empty where none were given"""


class RolledBack(Event, frozen=True, kw_only=True, tag="rolled_back"):
    """The server acknowledged that it serves an earlier version again, or one an operator asked for."""

    from_version: int
    to_version: int
    by: By
    barred_digest: str | None
    """weights that no gate may promote again; None where the step bars nothing"""
    reason: str = ""
    """an operator's own words, or what was found; empty where there are none"""


class SwapFailed(Event, frozen=True, kw_only=True, tag="swap_failed"):
    """The server refused a version and serves what it served."""

    version: int
    reason: str


class ServerStarted(Event, frozen=True, kw_only=True, tag="server_started"):
    """A server came up with this version."""

    version: int


class CanaryEnded(Event, frozen=True, kw_only=True, tag="canary_ended"):
    """A candidate's switchback on live traffic ended; the incumbent is in service."""

    version: int
    """of the candidate"""
    decision: str
    """gate.canary.Outcome"""
    evidence: dict[str, Any]
    """its numbers; `reason` among them"""


class GuardTripped(Event, frozen=True, kw_only=True, tag="guard_tripped"):
    """The guard found harm in the version in service; a `RolledBack` by the guard says what became of it."""

    version: int
    detector: str
    """gate.guard.DetectorName"""
    evidence: dict[str, Any]
    """its numbers; `reason` among them"""


class PrefixesRenewed(Event, frozen=True, kw_only=True, tag="prefixes_renewed"):
    """The server computes cached prefixes anew: on the KV of older drafts it lagged behind the version's shadow."""

    version: int
    """in service"""
    lag_tokens: float
    """mean of live minus shadow accept length"""


class DepthChanged(Event, frozen=True, kw_only=True, tag="depth_changed"):
    """The server drafts so many steps from now on, until it ends."""

    num_steps: int
    """0: no speculation"""
    by: Literal["floor", "guard", "operator"]
    reason: str = ""


class TargetChanged(Event, frozen=True, kw_only=True, tag="target_changed"):
    """The server's target has other weights: what was shown of any draft was shown of another target."""

    from_digest: str
    to_digest: str
    num_updates: int = 0
    """since the server started; 0 where it started with other weights"""


class Order(Event, frozen=True, kw_only=True):
    """What holds from now on, until it is taken back."""

    by: Literal["operator"] = "operator"
    reason: str = ""


class Pinned(Order, frozen=True, kw_only=True, tag="pinned"):
    """A version stays in service: nothing is promoted and nothing else put in service while the pin holds."""

    version: int


class Unpinned(Order, frozen=True, kw_only=True, tag="unpinned"):
    """The pin holds no longer."""

    version: int


class Paused(Order, frozen=True, kw_only=True, tag="paused"):
    """The gate starts no race and promotes nothing; capture and training go on."""


class Resumed(Order, frozen=True, kw_only=True, tag="resumed"):
    """The gate works again."""


AnyEvent = (
    Published
    | RaceStarted
    | Judged
    | Withheld
    | Promoted
    | RolledBack
    | SwapFailed
    | ServerStarted
    | CanaryEnded
    | GuardTripped
    | PrefixesRenewed
    | DepthChanged
    | TargetChanged
    | Pinned
    | Unpinned
    | Paused
    | Resumed
)

_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)


class Journal:
    """The journal file of one run directory; any process may read it or append to it."""

    def __init__(self, paths: RunPaths):
        self._path = paths.journal
        self._events: list[AnyEvent] = []
        """that were read, from the file's first `_num_bytes`: whoever follows a long journal decodes each event once"""
        self._num_bytes = 0

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
        with open(self._path, "rb") as file:
            if file.seek(0, os.SEEK_END) < self._num_bytes:  # an operator put an older one in its place
                self._events, self._num_bytes = [], 0
            file.seek(self._num_bytes)
            # What follows the last newline is an append that a crash cut short, or one still under way.
            *lines, _torn = file.read().split(b"\n")
        for line in lines:
            self._events.append(self._decode(line, len(self._events) + 1))
            self._num_bytes += len(line) + 1
        return tuple(self._events)

    def _decode(self, line: bytes, number: int) -> AnyEvent:
        try:
            return _decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise VersionError(
                f"{self._path} line {number}: no event ({error}); restore it or use a new run directory"
            ) from error


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
