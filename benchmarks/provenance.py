"""What every result says of how it came to be."""

import os
import platform
import sys
import time
from pathlib import Path

import torch

from onlinespec.bench.provenance import commit


def provenance() -> dict[str, object]:
    """commit: with a + where the tree had changes."""
    return {
        "command": " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
