"""What a recording says of itself. No torch.

A recording is a directory: shard-NNNNNN.safetensors files in the order they were written, and this manifest, which
is replaced last. What it does not list is no part of the recording; what it lists is checked by size and digest.
"""

import hashlib
from pathlib import Path

import msgspec

import onlinespec
from onlinespec.errors import RecordError

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """One file. digest: sha256 in hex."""

    file: str
    digest: str
    num_samples: int
    num_tokens: int
    num_answer_tokens: int
    num_bytes: int


class RowFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What all rows of one recording have in common; a draft is trained on them only if it reads the same."""

    target_digest: str
    hidden_size: int
    """of the target"""
    aux_layers: tuple[int, ...]
    """target layers whose inputs were captured, in the order of the columns"""
    teacher_top_k: int

    @property
    def row_width(self) -> int:
        """Values of a row; without captured layers a row is the target's last state."""
        return max(1, len(self.aux_layers)) * self.hidden_size


class RecordingManifest(msgspec.Struct, frozen=True, kw_only=True):
    """See the module's docstring."""

    facts: RowFacts
    sources: tuple[str, ...]
    """where the rows came from, each once: `server`, or a data set and whose answers it holds"""
    tenants: tuple[str, ...] = ()
    """whose traffic is in it, sorted"""
    shards: tuple[Shard, ...] = ()
    created_s: float
    """wall clock"""
    format_version: int = FORMAT_VERSION
    onlinespec_version: str = onlinespec.__version__

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


def read_manifest(directory: Path) -> RecordingManifest:
    """Raises: RecordError where there is none, it does not decode, or its format is not ours."""
    path = directory / MANIFEST_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}; give a directory that `onlinespec record` wrote") from error
    try:
        version = msgspec.json.decode(data, type=dict).get("format_version")
        if version == FORMAT_VERSION:
            return msgspec.json.decode(data, type=RecordingManifest)
    except msgspec.MsgspecError as error:
        raise RecordError(f"{path}: no manifest of a recording ({error}); record again") from error
    raise RecordError(f"{path}: format_version is {version}, this onlinespec reads {FORMAT_VERSION}; record again")


def manifest_digest(directory: Path) -> str:
    """Sha256, in hex, of the manifest, and so, by the digests in it, of every row."""
    return hashlib.sha256((directory / MANIFEST_FILE).read_bytes()).hexdigest()


def check_facts(directory: Path, found: RowFacts, wanted: RowFacts, advice: str) -> None:
    """Raises: RecordError naming the first of the facts that differs."""
    for name in RowFacts.__struct_fields__:
        if getattr(found, name) != getattr(wanted, name):
            raise RecordError(
                f"{directory}: its rows have {name} {_plain(getattr(found, name))}, "
                f"wanted {_plain(getattr(wanted, name))}; {advice}"
            )


def _plain(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
