"""The section of RESULTS.md on a GPU: every check that `make gpu` has, and what it found where it ran."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from bench_parts import markdown
from plan import CHECKS  # found by the line above


def gpu(folder: Path) -> str:
    """folder: where a check's JSON would be, named DATE-gpu-CHECK.json."""
    rows = [(f"`{check.name}`", check.question, check.goal, _found(folder, check.name)) for check in CHECKS]
    return markdown(("check", "question", "goal", "result"), rows)


def _found(folder: Path, name: str) -> str:
    """Files whose names tell of it; what they say is written by hand beside them."""
    files = sorted(folder.glob(f"*-gpu-{name}*.json"))
    return ", ".join(f"`results/{file.name}`" for file in files) or "not measured on a GPU"
