"""Streams a recording back in the order it was written. Nothing is skipped: what is damaged is refused by its name."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from onlinespec.draft.sample import Sample
from onlinespec.errors import RecordError
from onlinespec.record.manifest import manifest_digest, read_manifest
from onlinespec.record.shards import decode


class Recording:
    """A recording opened for reading. One shard is in memory at a time."""

    def __init__(self, directory: Path | str):
        """Raises: RecordError where a shard is missing, of another size, or not listed."""
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self.digest = manifest_digest(self.directory)
        """sha256 in hex; of every row, by the digests in the manifest"""
        listed = {shard.file for shard in self.manifest.shards}
        for path in sorted(self.directory.glob("shard-*")):
            if path.name not in listed:
                raise RecordError(f"{path}: not in the manifest: cut off by a crash, or another recording's; delete it")
        for shard in self.manifest.shards:
            path = self.directory / shard.file
            size = path.stat().st_size if path.is_file() else 0
            if size != shard.num_bytes:
                what = "missing" if not path.is_file() else "truncated" if size < shard.num_bytes else "too long"
                raise RecordError(
                    f"{path}: {what}: found {size} bytes, the manifest says {shard.num_bytes}; copy the recording again"
                )

    def __len__(self) -> int:
        """Samples."""
        return self.manifest.num_samples

    def __iter__(self) -> Iterator[Sample]:
        """Raises: RecordError where a shard's bytes are not those that were written."""
        return self.since(0)

    def since(self, index: int) -> Iterator[Sample]:
        """From the index-th sample on, in order. Raises: RecordError."""
        shard, offset = self.locate(index)
        for number in range(shard, len(self.manifest.shards)):
            yield from self.read_shard(number)[offset:]
            offset = 0

    def locate(self, index: int) -> tuple[int, int]:
        """Shard of the index-th sample, from 0, and its place therein; one past the last where there is none."""
        for number, shard in enumerate(self.manifest.shards):
            if index < shard.num_samples:
                return number, index
            index -= shard.num_samples
        return len(self.manifest.shards), 0

    def read_shard(self, number: int) -> list[Sample]:
        """Raises: RecordError where its bytes are not those that were written."""
        shard = self.manifest.shards[number]
        path = self.directory / shard.file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RecordError(f"{path}: cannot be read ({error.strerror}); copy the recording again") from error
        found = hashlib.sha256(data).hexdigest()
        if found != shard.digest:
            raise RecordError(
                f"{path}: its digest is {found}, the manifest says {shard.digest}; copy the recording again"
            )
        samples = decode(data, str(path))
        if len(samples) != shard.num_samples:
            raise RecordError(
                f"{path}: holds {len(samples)} samples, the manifest says {shard.num_samples}; record again"
            )
        return samples
