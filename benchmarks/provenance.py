"""What every result says of how it came to be."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch


def provenance() -> dict[str, object]:
    """commit: with a + where the tree had changes."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
    return {
        "command": " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
