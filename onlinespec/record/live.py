"""The sidecar's part of recording: follows the request in the run directory, and never stops the sidecar.

`onlinespec record` puts a request there, the sidecar looks for it once a second, writes what it trains on, and takes
the request away when the bound is reached or the disk refuses. A request outlives the command and the sidecar, which
goes on where it stopped; it does not outlive its server: nothing is written that nobody asked this server for.
"""

import os
import secrets
from pathlib import Path
from typing import Literal

import msgspec

from onlinespec.draft.sample import Sample
from onlinespec.errors import RecordError
from onlinespec.record.manifest import RowFacts
from onlinespec.record.recorder import Recorder

SERVER_SOURCE = "server"


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What `onlinespec record` asks for."""

    directory: str
    max_bytes: int
    serve_pid: int
    """the server that was asked"""
    name: str = msgspec.field(default_factory=lambda: secrets.token_hex(8))
    """tells this request from a later one"""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """What the sidecar's status says of a recording."""

    name: str
    directory: str
    state: Literal["running", "full", "stopped", "failed"]
    reason: str = ""
    num_bytes: int = 0
    max_bytes: int = 0
    num_samples: int = 0
    num_tokens: int = 0


def post_request(path: Path, request: Request) -> None:
    """Raises: FileExistsError where there is a request already."""
    temporary = path.with_name(f".{path.name}.{request.name}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(msgspec.json.encode(request))
    try:
        os.link(temporary, path)
    finally:
        temporary.unlink()


def read_request(path: Path) -> Request | None:
    """None where nothing is asked for. Raises: RecordError where the file does not decode."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Request)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise RecordError(f"{path}: no request to record ({error}); delete it") from error


class LiveRecording:
    """At most one recording at a time. Nothing here raises for a disk that is full or a directory that will not do."""

    def __init__(self, path: Path, serve_pid: int, facts: RowFacts, shard_bytes: int):
        self.progress: Progress | None = None
        """of the last recording; None before the first"""
        self._path = path
        self._serve_pid = serve_pid
        self._facts = facts
        self._shard_bytes = shard_bytes
        self._request: Request | None = None
        self._recorder: Recorder | None = None
        self._refusal = ""

    def poll(self, now_s: float) -> None:
        """Start, go on or stop, as the request file says."""
        try:
            request = read_request(self._path)
        except RecordError as error:
            self._path.unlink(missing_ok=True)
            if self._request is not None:
                self._end("failed", str(error))
            else:
                self.progress = Progress(name="", directory="", state="failed", reason=str(error))
            return
        if request is not None and request.serve_pid != self._serve_pid:
            self._path.unlink(missing_ok=True)
            request = None
        if request != self._request:
            if self._request is not None:
                self._end("stopped", "on request")
            if request is not None:
                self._begin(request, now_s)
        elif self._recorder is not None:
            self._tell("running")

    def end_for_good(self, reason: str) -> None:
        """No row from now on is of the target that the manifest names."""
        self._refusal = reason
        if self._request is not None:
            self._end("stopped", reason)

    def _begin(self, request: Request, now_s: float) -> None:
        self._request = request
        if self._refusal:
            self._end("failed", self._refusal)
            return
        try:
            self._recorder = Recorder(
                Path(request.directory),
                self._facts,
                SERVER_SOURCE,
                shard_bytes=self._shard_bytes,
                max_bytes=request.max_bytes,
                created_s=now_s,
            )
        except (RecordError, OSError) as error:
            self._end("failed", str(error))
            return
        self._tell("running")

    def add(self, sample: Sample) -> None:
        """Record a sample, if that is asked for."""
        if self._recorder is None:
            return
        try:
            if not self._recorder.add(sample):
                self._end("full", "")
        except (RecordError, OSError) as error:
            self._end("failed", str(error))

    def close(self) -> None:
        """The sidecar stops: what waits is written, and the request stays for the next sidecar."""
        if self._recorder is not None:
            try:
                self._recorder.close()
            except OSError as error:
                self._end("failed", str(error))

    def _end(self, state: Literal["full", "stopped", "failed"], reason: str) -> None:
        if self._recorder is not None:
            try:
                self._recorder.flush()
            except OSError as error:
                state, reason = "failed", str(error)
            self._recorder.abandon()
        self._tell(state, reason)
        self._recorder = None
        request, self._request = self._request, None
        try:
            if request is not None and read_request(self._path) == request:
                self._path.unlink(missing_ok=True)
        except RecordError:
            return  # another hand damaged it since; the next poll says so

    def _tell(self, state: Literal["running", "full", "stopped", "failed"], reason: str = "") -> None:
        request, recorder = self._request, self._recorder
        assert request is not None
        self.progress = Progress(
            name=request.name,
            directory=request.directory,
            state=state,
            reason=reason,
            num_bytes=recorder.num_bytes if recorder else 0,
            max_bytes=request.max_bytes,
            num_samples=recorder.num_samples if recorder else 0,
            num_tokens=recorder.num_tokens if recorder else 0,
        )
