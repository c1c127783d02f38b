"""The doctor: which hook sites resolve in an SGLang, installed, unpacked or a wheel that was never installed.

Nothing of SGLang is imported or run: its files are parsed.
"""

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from onlinespec.errors import SiteError
from onlinespec.plugin.sites import found_fingerprint, installed_sglang, known_versions, load_sites, sglang_root


@dataclass(frozen=True)
class Package:
    """An sglang package somewhere. version: its own; None where it does not say."""

    version: str | None
    root: Path | zipfile.Path
    place: str


def find_package(where: str = "") -> Package:
    """The installed one where `where` is empty, else that of a wheel or of a directory it was unpacked in.

    Raises: SiteError where there is none.
    """
    if not where:
        return Package(installed_sglang(), sglang_root(), "the installed SGLang")
    path = Path(where)
    root: Path | zipfile.Path = zipfile.Path(path) if path.is_file() and zipfile.is_zipfile(path) else path
    package = root if root.name == "sglang" else root / "sglang"
    if not (package / "srt").is_dir():
        raise SiteError(
            f"{where} holds no package sglang; give a wheel, the directory one was unpacked in, or one of"
            f" {', '.join(known_versions())}"
        )
    beside = path.parent if root is package else root
    infos = re.findall(r"sglang-([^-/]+)\.dist-info", " ".join(entry.name for entry in beside.iterdir()))
    return Package(infos[0] if infos else None, package, where)


def site_lines(what: str = "") -> tuple[list[str], bool]:
    """A line for each site, and whether all resolve.

    what: a known version, to look for its sites in the installed SGLang; else see `find_package`, and the sites are
    those of the package's own version, or of the newest one known where that has none.
    Raises: SiteError where there is no package.
    """
    is_version = what in known_versions()
    package = find_package("" if is_version else what)
    declared = what if is_version else package.version if package.version in known_versions() else known_versions()[-1]
    assert declared is not None
    lines, num_missing = [], 0
    for site in load_sites(declared):
        found = found_fingerprint(site, package.root)
        state = "resolves" if found == site.fingerprint else "is missing" if found is None else "has changed"
        num_missing += found != site.fingerprint
        lines.append(f"{site.name:<14} {state:<11} {site.symbol} in {site.file}")
    own = package.version or "of an unknown version"
    said = "all resolve" if not num_missing else f"{num_missing} of {len(lines)} do not resolve"
    hint = "" if not num_missing else f"; known to work: {', '.join(known_versions())}"
    head = f"{package.place} ({own}) against the sites of {declared}: {said}{hint}"
    return [head, *lines], not num_missing
