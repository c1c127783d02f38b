"""One life of a server: what `serve` resolved before it started its processes, and the lock it holds while it lives."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from onlinespec.errors import StartError
from onlinespec.paths import RunPaths


class Launch(msgspec.Struct, frozen=True):
    """One life of a server. Paths are absolute."""

    model: str
    draft: str
    """directory the server loads its draft from"""
    version: int
    """of that draft in the version store"""
    target_digest: str
    host: str
    port: int
    num_draft_steps: int
    max_context_tokens: int
    serve_pid: int
    capture_refused: str = ""
    """why this server's settings cannot be captured; empty when they can"""
    depth_refused: str = ""
    """why the draft depth cannot be changed while it runs; empty when it can"""

    @property
    def base_url(self) -> str:
        return f"http://{self.host}:{self.port}"


def write_launch(paths: RunPaths, launch: Launch) -> None:
    """Replace the file atomically."""
    temporary = paths.launch.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(launch)))
    temporary.rename(paths.launch)


def read_launch(root: Path | str) -> Launch:
    """Raises: StartError where the directory is not a run directory."""
    path = RunPaths(root).launch
    try:
        return msgspec.json.decode(path.read_bytes(), type=Launch)
    except FileNotFoundError as error:
        raise StartError(f"{path} is missing; {root} is no run directory of `onlinespec serve`") from error
    except msgspec.MsgspecError as error:
        raise StartError(f"{path}: {error}; start the server again") from error


@contextlib.contextmanager
def holding(paths: RunPaths) -> Iterator[None]:
    """Keep every other server out of a run directory meanwhile; the lock dies with the process.

    Raises: StartError where another server lives in it.
    """
    descriptor = os.open(paths.serve_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 32).decode() or "unknown"
            raise StartError(
                f"{paths.root} is the run directory of a running server (process {holder});"
                " give another --run-dir, or stop it"
            ) from error
        os.truncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)
