"""The version store: numbered directories that appear whole or not at all.

A version is written into a temporary directory inside the store, flushed to disk, and renamed to its
number; the rename is the publication. Numbers are handed out under a lock of the store, so concurrent
publishers get different ones. A publisher holds a lock on its temporary directory for as long as it lives;
a temporary directory that nobody holds was left by a crash, and the next open removes it. Removal goes the
same way backwards: renamed out of the numbers first, so that no half deleted version is ever listed.

Locks are flock(2): they die with their process. The store wants a local file system.
"""

import fcntl
import filecmp
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from onlinespec.config import VersionsConfig
from onlinespec.errors import VersionError
from onlinespec.paths import RunPaths
from onlinespec.versions.durable import sync_path, sync_tree
from onlinespec.versions.journal import Journal
from onlinespec.versions.manifest import WEIGHTS_FILE, Manifest, Provenance, read_manifest, write_manifest
from onlinespec.versions.retention import Deletion, choose
from onlinespec.versions.state import JournalState, state_of

PUBLISHING = ".publishing-"
REMOVING = ".removing-"
LOCK_FILE = ".lock"


@dataclass(frozen=True)
class Incumbent:
    """The version a server starts with."""

    manifest: Manifest
    instead_of: int | None = None
    """the version the journal names, where it cannot be served; None where it is this one"""
    reason: str = ""
    """why it cannot"""


class VersionStore:
    """The versions of one run directory. Opening it removes what a crash left behind."""

    def __init__(self, paths: RunPaths):
        self._paths = paths
        if paths.versions.is_dir():
            self._sweep()

    def publish(
        self,
        write_files: Callable[[Path], None],
        *,
        parent: int | None,
        target_digest: str,
        provenance: Provenance,
        created_s: float,
        verdict: dict[str, Any] | None = None,
        may_reuse: bool = False,
    ) -> Manifest:
        """Add the next version and return its manifest once it is durable.

        `write_files` gets an empty directory and writes model.safetensors and whatever goes with it. When it
        raises, the store is as before. With `may_reuse` a version of the same bytes, target and provenance that is
        there already is returned instead.

        Raises: VersionError where model.safetensors was not written, the parent is not in the store, or the
        disk refuses.
        """
        parent_digest = None if parent is None else self.manifest(parent).digest
        self._paths.create()
        with self._temporary() as directory:
            write_files(directory)
            if not (directory / WEIGHTS_FILE).is_file():
                raise VersionError(f"{directory}: no {WEIGHTS_FILE} was written; a version needs one")
            if may_reuse and (same := self._same(directory, target_digest, provenance)):
                return same
            digest = file_digest(directory / WEIGHTS_FILE)
            # Once here, where it is slow and holds nobody up; once more below, for the manifest.
            sync_tree(directory)
            with self._locked():
                manifest = Manifest(
                    version=max(self.numbers(), default=0) + 1,
                    digest=digest,
                    parent=parent,
                    parent_digest=parent_digest,
                    target_digest=target_digest,
                    created_s=created_s,
                    provenance=provenance,
                    verdict=verdict,
                )
                write_manifest(manifest, directory)
                sync_tree(directory)
                directory.rename(self._paths.version(manifest.version))
                sync_path(self._paths.versions)
        return manifest

    def numbers(self) -> tuple[int, ...]:
        """Every version in the store, ascending."""
        if not self._paths.versions.is_dir():
            return ()
        found = (int(path.name) for path in self._paths.versions.iterdir() if path.name.isdecimal())
        return tuple(sorted(number for number in found if self._paths.version(number).is_dir()))

    def latest(self) -> int | None:
        """Newest version; None in an empty store."""
        return max(self.numbers(), default=None)

    def manifest(self, number: int) -> Manifest:
        """Raises: VersionError where the version is not in the store or its manifest is damaged."""
        directory = self._paths.version(number)
        if not directory.is_dir():
            kept = ", ".join(str(kept) for kept in self.numbers()) or "none"
            raise VersionError(f"version {number} is not in {self._paths.versions}; it holds {kept}")
        manifest = read_manifest(directory)
        if manifest.version != number:
            raise VersionError(f"{directory}: its manifest says version {manifest.version}; delete it")
        return manifest

    def verify(self, number: int) -> Manifest:
        """Read all weights and compare them with the manifest.

        Raises: VersionError where the bytes on disk are not those that were published.
        """
        manifest = self.manifest(number)
        path = self._paths.version(number) / WEIGHTS_FILE
        try:
            found = file_digest(path)
        except OSError as error:
            raise VersionError(f"{path}: cannot be read ({error.strerror}); roll back") from error
        if found != manifest.digest:
            raise VersionError(
                f"{path}: its digest is {found}, the manifest says {manifest.digest}; "
                f"the file is damaged, roll back to another version"
            )
        return manifest

    def retain(self, config: VersionsConfig, state: JournalState, also: Collection[int] = ()) -> Deletion:
        """Delete what `retention.choose` says, for the disk as it is now; return what it said.

        Protected is what `state` protects, and `also`: versions on their way into service.
        """
        if not self._paths.versions.is_dir():
            return Deletion((), (), 0, 0, 0)
        with self._locked():
            sizes = {number: tree_bytes(self._paths.version(number)) for number in self.numbers()}
            free_bytes = shutil.disk_usage(self._paths.versions).free
            deletion = choose(sizes, state.promoted, {*state.protected, *also}, free_bytes, config)
            moved = [self._paths.versions / f"{REMOVING}{number:06d}" for number in deletion.versions]
            for number, path in zip(deletion.versions, moved, strict=True):
                self._paths.version(number).rename(path)
            sync_path(self._paths.versions)
            for path in moved:
                shutil.rmtree(path)
        return deletion

    def incumbent_for(self, target_digest: str) -> Incumbent | None:
        """The version a restarted server loads, its weights verified; None where the journal names none.

        A version of another target is one all the same where the server changed to this target while it served.
        One that is damaged, or was learned on an update of the target that a restart undoes, gives way to its newest
        undamaged ancestor of this target, but not where it is pinned.

        Raises: VersionError where no undamaged version of this target is left.
        """
        state = state_of(Journal(self._paths).read())
        incumbent = state.incumbent
        if incumbent is None:
            return None
        try:
            manifest = self.verify(incumbent)
        except VersionError as error:
            return self._ancestor(state, target_digest, str(error), "restore it")
        if target_digest in (manifest.target_digest, state.target_digest):
            return Incumbent(manifest)
        other = f"version {incumbent} was trained for target {manifest.target_digest}, the server has {target_digest}"
        return self._ancestor(state, target_digest, other, "start with that target's files")

    def _ancestor(self, state: JournalState, target_digest: str, reason: str, remedy: str) -> Incumbent:
        """The newest undamaged one of this target."""
        if state.pinned == state.incumbent:
            raise VersionError(
                f"version {state.pinned} is pinned and cannot be served: {reason}; {remedy}, or run"
                " `onlinespec unpin` and start again"
            )
        for number in state.ancestors:
            with suppress(VersionError):
                manifest = self.verify(number)
                if manifest.target_digest == target_digest:
                    return Incumbent(manifest, state.incumbent, reason)
        raise VersionError(
            f"{self._paths.root}: {reason}, and no version it was trained from is left undamaged for this target;"
            f" {remedy}, name another version with `onlinespec promote N` and start again, or start with a new run"
            " directory"
        )

    def _same(self, directory: Path, target_digest: str, provenance: Provenance) -> Manifest | None:
        """The newest version that holds what `directory` holds; None where there is none."""
        names = sorted(path.name for path in directory.iterdir())
        for number in reversed(self.numbers()):
            folder = self._paths.version(number)
            with suppress(VersionError):
                manifest = self.manifest(number)
                is_same = (manifest.target_digest, manifest.provenance) == (target_digest, provenance)
                if is_same and filecmp.cmpfiles(directory, folder, names, shallow=False)[0] == names:
                    return manifest
        return None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the store against other publishers and sweepers."""
        with open(self._paths.versions / LOCK_FILE, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A directory that is gone afterwards, whatever happens, unless it was renamed."""
        with self._locked():
            # Under the lock, or a sweep could take the directory between its creation and its own lock.
            directory = Path(tempfile.mkdtemp(prefix=PUBLISHING, dir=self._paths.versions))
            held = _lock_directory(directory)
        assert held is not None, directory
        try:
            yield directory
        except (OSError, SafetensorError) as error:  # safetensors does not tell a full disk as an OSError
            raise VersionError(f"{directory}: nothing was published ({error}); check the disk") from error
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(held)

    def _sweep(self) -> None:
        with self._locked():
            for path in self._paths.versions.glob(f"{REMOVING}*"):
                shutil.rmtree(path)
            for path in self._paths.versions.glob(f"{PUBLISHING}*"):
                held = _lock_directory(path)
                if held is not None:
                    shutil.rmtree(path)
                    os.close(held)


def file_digest(path: Path) -> str:
    """Sha256 of a file, in hex, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _lock_directory(path: Path) -> int | None:
    """Take the lock of a temporary directory; None where its publisher still lives."""
    held = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        return None
    return held
