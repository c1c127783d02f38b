"""What the packages of a kit require that neither the kit nor the image has; nothing, or something fails over there.

That a package can be imported proves little: openai imports jiter when the first chat is asked for. Names alone are
compared; versions that do not fit (SGLang's torch, its newer kernels) are chosen so.

Run: python benchmarks/gpu/kit_needs.py SITE; SITE is the kit unpacked. Exits with status 1 where something is lacking.
"""

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent


def names_in(file: Path) -> set[str]:
    """Of a list with comments, versions dropped."""
    words = (word for line in file.read_text().splitlines() for word in line.partition("#")[0].split())
    return {canonicalize_name(word.partition("==")[0]) for word in words}


def lacking(kit: Iterable[Distribution], there: set[str]) -> list[str]:
    """Requirements of the kit's own packages, extras not asked for left out, as `openai wants jiter`."""
    found = {canonicalize_name(package.metadata["Name"]): package.requires or [] for package in kit}
    wanted = []
    for name, requires in sorted(found.items()):
        for requirement in map(Requirement, requires):
            needed = canonicalize_name(requirement.name)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": "", "python_version": "3.12"})
            if applies and needed not in there | found.keys():
                wanted.append(f"{name} wants {needed}")
    return wanted


def main() -> int:
    there = names_in(HERE / "image.txt") | names_in(HERE / "kit-left-out.txt")
    wanted = lacking(distributions(path=[sys.argv[1]]), there)
    for line in wanted:
        print(f"neither in the kit nor in the image: {line}")
    return 1 if wanted else 0


if __name__ == "__main__":
    sys.exit(main())
