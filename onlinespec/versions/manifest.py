"""What a version says of itself: digests, parent, how it was trained, why it was promoted."""

from pathlib import Path
from typing import Any

import msgspec

import onlinespec
from onlinespec.errors import VersionError

MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "model.safetensors"


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """How the weights came to be."""

    optimizer_steps: int
    answer_tokens: int
    """answer tokens trained on, replays not counted"""
    seed: int
    tenants: tuple[str, ...]
    """whose traffic shaped the weights, over the whole life of the trainer"""
    is_fresh: bool = False
    """an untrained draft: `trainer.kv_free_steps` applies to what is trained from it"""
    source: str = ""
    """name of a draft that another tool trained and `onlinespec offer` brought: nothing else is known of it"""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One version. Digests are sha256 in hex."""

    version: int
    digest: str
    """of model.safetensors"""
    parent: int | None
    """version the training went on from; None for a draft that came from outside"""
    parent_digest: str | None
    """of the parent's model.safetensors; None where parent is None"""
    target_digest: str
    """of the target the draft was trained for"""
    created_s: float
    """wall clock"""
    provenance: Provenance
    verdict: dict[str, Any] | None = None
    """the gate's evidence (gate.verdict.Verdict); None for a version the gate never judged"""
    onlinespec_version: str = onlinespec.__version__


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Write it as indented JSON; the caller makes it durable."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (directory / MANIFEST_FILE).write_bytes(text + b"\n")


def read_manifest(directory: Path) -> Manifest:
    """Read a version's manifest.

    Raises: VersionError where it is missing or does not decode.
    """
    path = directory / MANIFEST_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise VersionError(f"{path}: cannot be read ({error.strerror}); roll back to another version") from error
    except msgspec.MsgspecError as error:
        raise VersionError(f"{path}: no manifest ({error}); roll back to another version") from error
