"""Hook sites: where we attach in SGLang, declared per version with a fingerprint of the source we wrap.

SGLang logs and skips a hook it cannot attach, so the declaration is checked twice: before SGLang is
imported (its files are parsed, not run) and, in the scheduler, after it applied the hooks. `sglang` is
not imported here.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import onlinespec
from onlinespec.errors import SiteError


@dataclass(frozen=True)
class Site:
    """One place in SGLang where a hook attaches.

    target: dotted path, as `HookRegistry.register` wants it. file, symbol: where its source stands, below
    the sglang package. hook: before, after or around. fingerprint: see `fingerprint_of`.
    """

    name: str
    target: str
    file: str
    symbol: str
    hook: str
    fingerprint: str
    why: str


def patches_dir() -> Path:
    """`patches/` of the checkout or of the installed package."""
    package = Path(onlinespec.__file__).parent
    installed = package / "patches"
    return installed if installed.is_dir() else package.parent / "patches"


def known_versions() -> list[str]:
    """SGLang versions with a folder in `patches/`."""
    return sorted(path.parent.name for path in patches_dir().glob("*/sites.toml"))


def installed_sglang() -> str:
    """Version of the installed SGLang, without importing it.

    Raises: SiteError where none is installed.
    """
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError as error:
        raise SiteError(
            f"SGLang is not installed; install sglang=={known_versions()[-1]}"
            " (GPU: pip install 'onlinespec[gpu]'; CPU: make venv)"
        ) from error


def load_sites(version: str) -> list[Site]:
    """Sites of an SGLang version.

    Raises: SiteError where the version is not known.
    """
    path = patches_dir() / version / "sites.toml"
    if not path.is_file():
        raise SiteError(
            f"SGLang {version} is installed; onlinespec {onlinespec.__version__} knows"
            f" {', '.join(known_versions())}: install one of these"
        )
    with path.open("rb") as file:
        return [Site(**entry) for entry in tomllib.load(file)["site"]]


def fingerprint_of(source: str, symbol: str) -> str | None:
    """First 16 hex digits of the SHA-256 of a symbol's source lines; None where it is not there.

    The text, not the syntax tree: a tree's dump differs between Python versions.
    """
    node: ast.AST = ast.parse(source)
    for part in symbol.split("."):
        found = next(
            (
                child
                for child in ast.iter_child_nodes(node)
                if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and child.name == part
            ),
            None,
        )
        if found is None:
            return None
        node = found
    text = ast.get_source_segment(source, node) or ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def found_fingerprint(site: Site, root: Path | zipfile.Path) -> str | None:
    """Of the site's source below an sglang package, unpacked or in a wheel; None where it is not there."""
    file = root / site.file
    return fingerprint_of(file.read_text(encoding="utf-8"), site.symbol) if file.is_file() else None


def check_sites(version: str | None = None, root: Path | None = None) -> list[Site]:
    """Check every site's source against its fingerprint, importing nothing of SGLang.

    version, root: of SGLang and its package directory; None means the installed one's.
    Raises: SiteError naming the first site that is missing or has changed.
    """
    version = version or installed_sglang()
    sites = load_sites(version)
    root = root or sglang_root()
    for site in sites:
        found = found_fingerprint(site, root)
        if found is None:
            raise SiteError(f"site {site.name}: {site.symbol} is not in {site.file} of SGLang {version}")
        if found != site.fingerprint:
            raise SiteError(
                f"site {site.name}: {site.symbol} of the installed SGLang {version} has fingerprint {found}, wanted"
                f" {site.fingerprint}; its source was changed: reinstall sglang=={version}"
            )
    return sites


def sglang_root() -> Path:
    """The installed package's directory. Raises: SiteError where there is none."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise SiteError("the package sglang has no directory; reinstall it")
    return Path(spec.submodule_search_locations[0])
