"""Drafts that other tools trained, on their way to the gate: the run directory's `offers`, oldest first.

`onlinespec offer` leaves a copy there by rename, whole or not at all, with the digest it should have. The sidecar
moves it out before it reads it: a file that ends the process is not met again by the next one.

What such a draft was trained on is not known here, except what this run directory has trained on itself: one trained on
another recording of the same conversations is judged on them as if they were new to it.
"""

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from onlinespec.draft.checkpoint import read_draft
from onlinespec.draft.config import CONFIG_FILE, DraftConfig
from onlinespec.draft.header import WEIGHTS_FILE, check_same_shape
from onlinespec.draft.header import digest as file_digest
from onlinespec.draft.model import Draft
from onlinespec.errors import CheckpointError
from onlinespec.launch import read_launch
from onlinespec.paths import RunPaths
from onlinespec.versions.durable import sync_path, sync_tree

_DIGEST_FILE = "digest"
_TAKEN = ".taken"


@dataclass(frozen=True)
class Offer:
    """A draft's directory, with the digest its weights should have."""

    folder: Path
    name: str
    """of the directory it was copied from"""
    digest: str


def offer(root: Path, path: Path, digest: str = "") -> str:
    """Leave a copy of a draft's directory for the gate; returns the line to show. digest: empty for the file's own.

    What is wrong with it is the gate's to find, and the journal's to keep.
    Raises: StartError where `root` is no run directory; CheckpointError where a file of the draft is missing.
    """
    read_launch(root)
    paths = RunPaths(root)
    digest = digest.lower() or file_digest(path)
    for file in (path / WEIGHTS_FILE, path / CONFIG_FILE):
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file; give the directory of a draft")
    before = waiting(paths)
    if any(other.digest == digest for other in before):
        return f"a draft with digest {digest[:12]} is waiting already; nothing was changed"
    paths.offers.mkdir(mode=0o700, exist_ok=True)
    name = path.resolve().name
    with tempfile.TemporaryDirectory(prefix=".", dir=paths.offers) as temporary:
        copy = Path(temporary) / "draft"
        copy.mkdir()
        for part in (WEIGHTS_FILE, CONFIG_FILE):
            shutil.copyfile(path / part, copy / part)
        (copy / _DIGEST_FILE).write_text(digest)
        sync_tree(copy)
        copy.rename(paths.offers / f"{time.time_ns()}-{name}")
        sync_path(paths.offers)
    return f"{name} waits for the gate behind {len(before)} others; `onlinespec history` shows what becomes of it"


def waiting(paths: RunPaths) -> list[Offer]:
    """What was offered and not yet taken, oldest first."""
    folders = sorted(paths.offers.glob("[0-9]*-*"))
    return [Offer(f, f.name.partition("-")[2], (f / _DIGEST_FILE).read_text()) for f in folders]


def take(paths: RunPaths) -> Offer | None:
    """The oldest, no longer waiting; None where there is none. What was taken before is deleted."""
    found = waiting(paths)
    if not found:
        return None
    taken = paths.offers / _TAKEN
    shutil.rmtree(taken, ignore_errors=True)
    found[0].folder.rename(taken)
    return Offer(taken, found[0].name, found[0].digest)


def read_offer(found: Offer, served: DraftConfig, num_layers: int) -> dict[str, torch.Tensor]:
    """Weights as the trainer's own would be: float32, on the CPU, by canonical names. num_layers: of the target.

    Raises: CheckpointError where they are damaged, other than their digest, or not of the served draft's shape.
    """
    file = found.folder / WEIGHTS_FILE
    has = file_digest(found.folder)
    if has != found.digest:
        raise CheckpointError(
            f"{file} has digest {has[:12]}, wanted {found.digest[:12]}; it was damaged or replaced: offer it again"
        )
    try:
        config, weights = read_draft(found.folder)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: {error}; export the draft again") from error
    check_same_shape(found.folder / CONFIG_FILE, config, served, num_layers)
    return Draft(config, weights).weights()
