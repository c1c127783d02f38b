"""What every result says of how it came to be."""

import os
import sys
from pathlib import Path

import torch

from onlinespec.bench import provenance as bench

ROOT = Path(__file__).parent.parent


def provenance() -> dict[str, object]:
    """commit: with a + where the tree had changes. gpus: those nvidia-smi names. versions: see `bench.PACKAGES`."""
    found = bench.provenance(base_url="", run_dir=None)
    return {
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "commit": found.commit,
        "time": found.time,
        **found.machine,
        "threads": torch.get_num_threads(),
        "versions": found.versions,
        "cuda": torch.version.cuda,
    }
