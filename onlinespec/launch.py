"""What `serve` resolved before it started its processes, for the sidecar, the plugin and the commands to read."""

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
