"""Appends samples to a recording, never beyond its bound.

A shard is written under a temporary name, flushed, renamed, and then listed in the manifest, which is replaced the
same way: a crash at any moment leaves the recording as it was before the shard. Samples wait in memory for their
shard; a crash loses those, at most `shard_bytes` of them. Directory and files are their owner's only.
"""

import fcntl
import hashlib
import os
from pathlib import Path

import msgspec

from onlinespec.draft.sample import Sample
from onlinespec.errors import RecordError
from onlinespec.record.manifest import (
    MANIFEST_FILE,
    RecordingManifest,
    RowFacts,
    Shard,
    check_facts,
    read_manifest,
    shard_name,
)
from onlinespec.record.shards import HEADER_BYTES, encode, sample_bytes
from onlinespec.versions.durable import sync_path

# What the manifest itself may take: a line per shard, and the tenants' names.
_SHARD_ENTRY_BYTES = 400


class Recorder:
    """One recording, held against other writers until `close`.

    max_bytes bounds the whole directory, what an earlier recorder wrote included.
    """

    def __init__(
        self, directory: Path, facts: RowFacts, source: str, *, shard_bytes: int, max_bytes: int, created_s: float
    ):
        """Raises: RecordError where the directory holds something else, or is being written to; OSError."""
        self.manifest = RecordingManifest(facts=facts, sources=(source,), created_s=created_s)
        self.directory = directory
        self._shard_bytes = shard_bytes
        self._max_bytes = max_bytes
        self._waiting: list[Sample] = []
        self._waiting_bytes = 0
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock: int | None = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise RecordError(f"{directory}: {error.strerror}; give a directory that can be made") from error
        try:
            self._take_over(facts, source)
        except (RecordError, OSError):
            self.abandon()
            raise

    def _take_over(self, facts: RowFacts, source: str) -> None:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecordError(f"{self.directory}: another process is recording into it; choose another") from error
        if (self.directory / MANIFEST_FILE).exists():
            manifest = read_manifest(self.directory)
            check_facts(self.directory, manifest.facts, facts, "record into another directory")
            sources = tuple(dict.fromkeys([*manifest.sources, source]))
            self.manifest = msgspec.structs.replace(manifest, sources=sources)
            for path in self.directory.glob(".*.tmp"):
                path.unlink()  # left by a kill in the middle of a write
            for path in self.directory.glob("shard-*"):
                if path.name not in {shard.file for shard in manifest.shards}:
                    path.unlink()  # left by a crash before it was listed
        elif any(path for path in self.directory.iterdir() if not path.name.startswith((".shard", ".manifest"))):
            raise RecordError(f"{self.directory}: holds files and no recording; give an empty or a new directory")
        os.chmod(self.directory, 0o700)
        self._write_manifest(self.manifest)

    @property
    def num_bytes(self) -> int:
        """Of what is on disk or waits for its shard; never above max_bytes."""
        return self.manifest.num_bytes + self._waiting_bytes

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples + len(self._waiting)

    @property
    def num_tokens(self) -> int:
        return self.manifest.num_tokens + sum(sample.num_tokens for sample in self._waiting)

    def add(self, sample: Sample) -> bool:
        """Take a sample; False where the bound leaves no room for it, and then nothing more should be offered.

        Raises: RecordError where the sample has other columns than the recording; OSError.
        """
        facts = self.manifest.facts
        columns = (sample.aux_TA.shape[1], sample.teacher_ids_Tk.shape[1])
        if columns != (facts.row_width, facts.teacher_top_k):
            raise RecordError(
                f"{self.directory}: a sample has rows of {columns[0]} values with {columns[1]} teacher logits, its "
                f"recording {facts.row_width} with {facts.teacher_top_k}; use another one"
            )
        num_bytes = sample_bytes(sample) + (0 if self._waiting else HEADER_BYTES)
        manifest_bytes = _SHARD_ENTRY_BYTES * (len(self.manifest.shards) + 3) + 8 * len(
            "".join(self._tenants([*self._waiting, sample]))
        )
        if self.num_bytes + num_bytes + manifest_bytes > self._max_bytes:
            return False
        self._waiting.append(sample)
        self._waiting_bytes += num_bytes
        if self._waiting_bytes >= self._shard_bytes:
            self.flush()
        return True

    def flush(self) -> None:
        """Write what waits as a shard. Raises: OSError, and then what waits still waits."""
        if not self._waiting:
            return
        data = encode(self._waiting)
        shard = Shard(
            file=shard_name(len(self.manifest.shards) + 1),
            digest=hashlib.sha256(data).hexdigest(),
            num_samples=len(self._waiting),
            num_tokens=sum(sample.num_tokens for sample in self._waiting),
            num_answer_tokens=sum(sample.num_answer_tokens for sample in self._waiting),
            num_bytes=len(data),
        )
        self._write(shard.file, data)
        manifest = msgspec.structs.replace(
            self.manifest, shards=(*self.manifest.shards, shard), tenants=self._tenants(self._waiting)
        )
        self._write_manifest(manifest)
        self.manifest = manifest
        self._waiting, self._waiting_bytes = [], 0

    def _tenants(self, samples: list[Sample]) -> tuple[str, ...]:
        return tuple(sorted({*self.manifest.tenants, *(sample.tenant for sample in samples)}))

    def close(self) -> None:
        """Write what waits and let go. Raises: OSError, and then nothing has been let go."""
        self.flush()
        self.abandon()

    def abandon(self) -> None:
        """Let go; what waited for its shard is lost."""
        self._waiting, self._waiting_bytes = [], 0
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _write_manifest(self, manifest: RecordingManifest) -> None:
        self._write(MANIFEST_FILE, msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")

    def _write(self, name: str, data: bytes) -> None:
        temporary = self.directory / f".{name}.tmp"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self.directory / name)
        except OSError:
            temporary.unlink(missing_ok=True)  # or a full disk would stay full
            raise
        sync_path(self.directory)
