"""`onlinespec record-dataset`: a data set and a transformers target to a recording that `train` reads."""

import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import track

from onlinespec.errors import DataError
from onlinespec.offline.chat import read_chats
from onlinespec.offline.rows import TargetRows
from onlinespec.record.recorder import Recorder


def record_dataset(
    file: Path, rows: TargetRows, out: Path, *, source: str, shard_bytes: int, max_bytes: int, console: Console
) -> Counter[str]:
    """Write every usable answer of the file until the bound is reached; returns what was used and left out.

    Raises: DataError where a line is no conversation, or nothing could be used; RecordError; OSError.
    """
    chats = list(read_chats(file))
    recorder = Recorder(out, rows.facts, source, shard_bytes=shard_bytes, max_bytes=max_bytes, created_s=time.time())
    try:
        is_full = False
        for messages in track(chats, "conversations", console=console):
            # In order: a conversation may not fit whole.
            is_full = not all(recorder.add(sample) for sample in rows.samples(messages))
            if is_full:
                break
        if not recorder.num_samples and is_full:
            raise DataError(f"{out}: its bound leaves no room for one answer; raise --max-gb")
        if not recorder.num_samples:
            reasons = ", ".join(f"{name} {count}" for name, count in sorted(rows.counters.items()))
            raise DataError(f"{file}: no answer in it could be used ({reasons}); see `record-dataset --help`")
        recorder.close()
    finally:
        recorder.abandon()
    manifest = recorder.manifest
    console.print(
        f"{out}: {manifest.num_samples} samples, {manifest.num_tokens} tokens, {manifest.num_bytes / 1e9:.3f} GB"
        + ("; full, the rest of the data set was left out" if is_full else "")
    )
    for name, count in sorted(rows.counters.items()):
        console.print(f"  {name} {count}")
    return rows.counters
