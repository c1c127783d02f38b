"""What a result says of how it came to be: code, versions, machine, server, command."""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec

from onlinespec.errors import BenchError
from onlinespec.launch import read_launch
from onlinespec.paths import RunPaths

PACKAGES = ("onlinespec", "sglang", "torch", "openai")
SERVER_FIELDS = (
    "version",
    "model_path",
    "speculative_draft_model_path",
    "speculative_algorithm",
    "speculative_num_steps",
    "speculative_eagle_topk",
    "speculative_num_draft_tokens",
    "dtype",
    "device",
    "tp_size",
)
"""what is kept of SGLang's /server_info (0.5.23), its own version first"""


class Provenance(msgspec.Struct, frozen=True):
    """Of one session of a benchmark; a resumed one has several.

    commit: with a + where the tree had changes; None outside a git checkout. versions: of this Python, None where not
    installed. machine: where the benchmark ran, and the server too if it has this host's address. server: empty where
    it told nothing. config_digest: SHA-256 of the run directory's resolved config; None where none was named.
    """

    time: str
    command: str
    commit: str | None
    versions: dict[str, str | None]
    machine: dict[str, Any]
    server: dict[str, Any]
    config_digest: str | None


def provenance(base_url: str, run_dir: Path | None) -> Provenance:
    """base_url: empty where there is no one server.

    Raises: BenchError where run_dir is another server's; StartError where it is no run directory.
    """
    return Provenance(
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=shlex.join(["onlinespec", *sys.argv[1:]]),
        commit=commit(),
        versions={name: _version(name) for name in PACKAGES},
        machine=machine(),
        server=server_info(base_url) if base_url else {},
        config_digest=None if run_dir is None else _config_digest(base_url, run_dir),
    )


def commit() -> str | None:
    """Of the checkout this package runs from."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
    if shutil.which("git") is None:
        return None
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    """Processor, cores, and the GPUs that nvidia-smi names."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpus": _gpus(),
    }


def server_info(base_url: str) -> dict[str, Any]:
    """SERVER_FIELDS of an SGLang server; empty of another, or where it wants a key."""
    try:
        reply = httpx.get(f"{base_url.rstrip('/')}/server_info", timeout=30)
        found = reply.json() if reply.status_code == httpx.codes.OK else {}
    except (httpx.HTTPError, ValueError):
        return {}
    return {name: found[name] for name in SERVER_FIELDS if name in found} if isinstance(found, dict) else {}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []


def _config_digest(base_url: str, run_dir: Path) -> str:
    port, served = urlsplit(base_url).port, read_launch(run_dir).port
    if port != served:
        raise BenchError(f"{run_dir} is of the server on port {served}, and {base_url} is asked; name the one asked")
    return hashlib.sha256(RunPaths(run_dir).resolved_config.read_bytes()).hexdigest()
