"""`onlinespec record`: asks a running server's sidecar for rows on disk, and shows how far it is."""

import os
import time
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from onlinespec.errors import RecordError
from onlinespec.launch import read_launch
from onlinespec.paths import RunPaths
from onlinespec.record.live import Progress as Told
from onlinespec.record.live import Request, post_request, read_request

_POLL_S = 0.5
_STALE_S = 10.0
_STOP_TIMEOUT_S = 15.0


class _Status(msgspec.Struct):
    """What of the sidecar's status is read here."""

    time_s: float
    recording: Told | None = None


def record(root: Path, directory: Path, max_bytes: int, console: Console) -> None:
    """Ask, then show the progress until the bound is reached; Ctrl-C stops the recording.

    A killed command leaves the recording to its bound; `--stop` ends it.
    Raises: StartError where this is no run directory; RecordError where there is a recording already, the server
    captures nothing, or the recording fails.
    """
    launch, paths = read_launch(root), RunPaths(root)
    if launch.capture_refused:
        raise RecordError(
            f"{root}: this server captures nothing: {launch.capture_refused}; there are no rows to record"
        )
    request = Request(directory=str(directory.absolute()), max_bytes=max_bytes, serve_pid=launch.serve_pid)
    try:
        post_request(paths.record_request, request)
    except FileExistsError as error:
        found = read_request(paths.record_request)
        where = f" into {found.directory}" if found else ""
        raise RecordError(f"{root}: a recording{where} is under way; end it with `onlinespec record --stop`") from error
    told = None
    try:
        told = _watch(paths, request, console)
    except KeyboardInterrupt:
        paths.record_request.unlink(missing_ok=True)
        told = _wait_for_end(paths, request.name)
    if told is None:
        console.print(f"asked to stop; the sidecar has not answered in {_STOP_TIMEOUT_S:.0f} s")
    elif told.state == "failed":
        raise RecordError(f"recording into {told.directory} failed: {told.reason}")
    else:
        console.print(summary(told))


def stop(root: Path) -> str:
    """End the recording under way; the line to show.

    Raises: StartError where this is no run directory; RecordError where nothing is being recorded.
    """
    read_launch(root)
    paths = RunPaths(root)
    request = read_request(paths.record_request)
    if request is None:
        raise RecordError(f"{root}: nothing is being recorded")
    paths.record_request.unlink(missing_ok=True)
    told = _wait_for_end(paths, request.name)
    return summary(told) if told else f"asked to stop recording into {request.directory}; the sidecar does not answer"


def summary(told: Told) -> str:
    """One line."""
    size = f"{told.num_samples} samples, {told.num_tokens} tokens, {told.num_bytes / 1e9:.3f} GB"
    return f"{told.directory}: {size}; {told.state} {told.reason}".rstrip()


def _watch(paths: RunPaths, request: Request, console: Console) -> Told:
    """Until the recording ends by itself."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("waiting for the sidecar", total=request.max_bytes)
        withdrawn_s = None
        while True:
            status = _read_status(paths)
            told = status.recording if status else None
            if not paths.record_request.exists() and (told is None or told.name != request.name):
                # The sidecar removes the request of a recording that has ended, and says so a second later.
                withdrawn_s = withdrawn_s or time.monotonic()
                if time.monotonic() - withdrawn_s > _STALE_S:
                    raise RecordError(f"{paths.root}: the recording was stopped before it began; start it again")
            if told is not None and told.name == request.name:
                text = f"{told.num_samples} samples, {told.num_tokens} tokens"
                bar.update(task, completed=told.num_bytes, description=text)
                if told.state != "running":
                    return told
            if status is None or time.time() - status.time_s > _STALE_S:
                bar.update(task, description="the sidecar has not reported for 10 s")
                _check_server(paths, request)
            time.sleep(_POLL_S)


def _check_server(paths: RunPaths, request: Request) -> None:
    try:
        os.kill(request.serve_pid, 0)
    except ProcessLookupError as error:
        paths.record_request.unlink(missing_ok=True)
        raise RecordError(f"{paths.root}: the server has ended; what was written is in {request.directory}") from error
    except PermissionError:
        return  # alive, and another user's


def _wait_for_end(paths: RunPaths, name: str) -> Told | None:
    """None where the sidecar says nothing of this recording's end in time."""
    deadline_s = time.monotonic() + _STOP_TIMEOUT_S
    while time.monotonic() < deadline_s:
        status = _read_status(paths)
        told = status.recording if status else None
        if told is not None and told.name == name and told.state != "running":
            return told
        time.sleep(_POLL_S)
    return None


def _read_status(paths: RunPaths) -> _Status | None:
    try:
        return msgspec.json.decode(paths.sidecar_status.read_bytes(), type=_Status)
    except FileNotFoundError:
        return None
