"""Flushing to disk: a rename or an append is durable only after its directory or file was flushed."""

import os
from pathlib import Path


def sync_path(path: Path) -> None:
    """Flush one file, or the names in one directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Flush every file, then every directory, innermost first."""
    for directory, _, files in os.walk(root, topdown=False):
        for name in files:
            sync_path(Path(directory) / name)
        sync_path(Path(directory))
