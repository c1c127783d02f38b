"""What is in service, and how that changes: published, swapped in, rolled back, written down.

Whoever changes it reads the journal, asks the server and writes the outcome under the journal's lock, so a
rollback by an operator cannot come between.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from onlinespec.config import VersionsConfig
from onlinespec.draft.checkpoint import read_draft, write_draft
from onlinespec.draft.config import DraftConfig
from onlinespec.draft.model import Draft
from onlinespec.errors import VersionError
from onlinespec.gate.guard import GuardVerdict
from onlinespec.gate.lag import Lag
from onlinespec.gate.verdict import barred_reason
from onlinespec.launch import Launch
from onlinespec.paths import RunPaths
from onlinespec.versions.journal import (
    GuardTripped,
    Journal,
    PrefixesRenewed,
    Promoted,
    Published,
    ServerStarted,
    SwapFailed,
    TargetChanged,
    Withheld,
)
from onlinespec.versions.manifest import Manifest, Provenance
from onlinespec.versions.state import JournalState, rollback_from, state_of
from onlinespec.versions.store import VersionStore
from onlinespec.wire.messages import GetHello, Hello, RenewPrefixes, Swap
from onlinespec.wire.sockets import ControlClient


@dataclass(frozen=True)
class Candidate:
    """Frozen weights and what shaped them."""

    digest: str
    weights: dict[str, torch.Tensor]
    draft: Draft
    provenance: Provenance


class Service:
    """The one version in service, and its shadow. Several processes write the journal: `sync` follows it."""

    def __init__(
        self, paths: RunPaths, config: VersionsConfig, launch: Launch, control: ControlClient, device: str = "cpu"
    ):
        self.journal = Journal(paths)
        self.state = JournalState()
        self.version = 0
        self.draft_config: DraftConfig
        self.draft: Draft
        """the shadow of the version in service"""
        self._paths = paths
        self._config = config
        self._launch = launch
        self._device = device
        self._control = control
        self._store = VersionStore(paths)
        self._journal_bytes = -1
        self.reconcile()
        self.sync()

    def reconcile(self) -> None:
        """The server serves another version than the journal says: a crash, or a lost answer, between a swap and its
        line. The server is right, and is asked under the lock."""
        with self.journal.decision():
            hello = self._control.request(GetHello())
            assert isinstance(hello, Hello), hello
            events = self.journal.read()
            state = state_of(events)
            if state.incumbent in (None, hello.version):
                return
            published = [event.version for event in events if isinstance(event, Published)]
            settled = {event.version for event in events if isinstance(event, Promoted | SwapFailed)}
            if hello.version == published[-1] and hello.version not in settled:
                event = Promoted(time_s=time.time(), version=hello.version, from_version=state.incumbent, by="gate")
                self.journal.append(event)
            else:
                self.journal.append(rollback_from(state, hello.version, "operator", time.time()))

    def sync(self) -> bool:
        """Follow the journal; True where another hand changed the version in service, which is the shadow now."""
        size = self._paths.journal.stat().st_size
        if size == self._journal_bytes:
            return False
        self._journal_bytes = size
        self.state = state_of(self.journal.read())
        assert self.state.incumbent is not None, "serve writes the version it started with before the sidecar starts"
        if self.state.incumbent == self.version:
            return False
        self.version = self.state.incumbent
        self.draft_config, weights = read_draft(self._paths.version(self.version))
        self.draft = self.shadow(weights)
        return True

    def shadow(self, weights: dict[str, torch.Tensor]) -> Draft:
        """Of the served draft's shape, where drafts are walked."""
        return Draft(self.draft_config, weights).to(self._device)

    @property
    def target_digest(self) -> str:
        """Of the target's weights as they are now."""
        return self.state.target_digest or self._launch.target_digest

    @property
    def is_fresh(self) -> bool:
        """The version in service is an untrained draft."""
        return self._store.manifest(self.version).provenance.is_fresh

    def parent(self) -> tuple[int, Draft] | None:
        """The version that the one in service was trained from; None where it is not in the store, or of another
        target."""
        parent = self.state.parents.get(self.version)
        if parent is None or not self._paths.version(parent).is_dir():
            return None
        try:
            if self._store.verify(parent).target_digest != self.target_digest:
                return None
        except VersionError as error:
            print(f"onlinespec sidecar: no guard against version {parent}: {error}", flush=True)
            return None
        return parent, self.shadow(read_draft(self._paths.version(parent))[1])

    def is_forbidden(self, candidate: Candidate) -> bool:
        """Something else than a verdict stands against a promotion; it is written down."""
        state = state_of(self.journal.read())
        reason = state.hold or barred_reason(candidate.digest, state.barred)
        if state.incumbent != self.version:
            reason = f"version {state.incumbent} came into service meanwhile"
        if reason:
            self.journal.append(Withheld(time_s=time.time(), candidate_digest=candidate.digest, reason=reason))
        return bool(reason)

    def publish(self, candidate: Candidate, evidence: dict) -> Manifest:
        """A version of its own, not yet in service."""

        def write(folder: Path) -> None:
            write_draft(folder, self.draft_config, candidate.weights)

        self._retain()  # first: others may have filled the disk since the last promotion
        manifest = self._store.publish(
            write,
            parent=self.version,
            target_digest=self.target_digest,
            provenance=candidate.provenance,
            created_s=time.time(),
            verdict=evidence,
        )
        assert manifest.digest == candidate.digest, "what was judged is not what was written"
        published = Published(
            time_s=time.time(), version=manifest.version, digest=manifest.digest, parent=manifest.parent
        )
        self.journal.append(published)
        return manifest

    def weights_path(self, version: int) -> str:
        return str(self._paths.version(version))

    def promote(self, candidate: Candidate, manifest: Manifest) -> bool:
        """Swap a published candidate in; False where something forbids it or the server refuses."""
        with self.journal.decision():
            if self.is_forbidden(candidate) or not self._swap(manifest):
                return False
            self.journal.append(
                Promoted(time_s=time.time(), version=manifest.version, from_version=self.version, by="gate")
            )
        self.version, self.draft = manifest.version, candidate.draft
        self._retain()
        return True

    def renew_prefixes(self, lag: Lag) -> bool:
        """Have the server compute cached prefixes anew, because of this lag; False where it refuses."""
        ack = self._control.acknowledged(RenewPrefixes())
        if ack.is_ok:
            event = PrefixesRenewed(time_s=time.time(), version=self.version, lag_tokens=lag.mean_tokens)
            self.journal.append(event)
        else:
            print(f"onlinespec sidecar: cached prefixes stay as they are: {ack.message}", flush=True)
        lag.renewed(self.version, time.time() if ack.is_ok else None)
        return ack.is_ok

    def roll_back(self, harm: GuardVerdict) -> str:
        """The guard's word, written down with its evidence; says why it was not carried out, empty where it was."""
        evidence = msgspec.to_builtins(harm)
        self.journal.append(
            GuardTripped(time_s=time.time(), version=harm.version, detector=harm.detector, evidence=evidence)
        )
        with self.journal.decision():
            state = state_of(self.journal.read())
            if state.pinned is not None:
                return f"version {state.pinned} is pinned"
            if state.incumbent != harm.version:
                return f"version {state.incumbent} is in service"
            is_barred = state.digests.get(harm.parent_version) in state.barred
            to = state.previous if is_barred else harm.parent_version  # what it was compared with
            if to is None:
                return "there is no version to return to"
            event = rollback_from(state, to, "guard", time.time(), harm.reason)
            try:
                manifest = self._store.verify(event.to_version)
            except VersionError as error:
                return str(error)
            if not self._swap(manifest):
                return "the server refused the swap"
            self.journal.append(event)
        return ""

    def _swap(self, manifest: Manifest) -> bool:
        """Under the journal's lock. A refusal is written down."""
        ack = self._control.acknowledged(Swap(manifest.version, self.weights_path(manifest.version), manifest.digest))
        if not ack.is_ok:
            self.journal.append(SwapFailed(time_s=time.time(), version=manifest.version, reason=ack.message))
        return ack.is_ok

    def change_target(self, num_updates: int) -> None:
        """Write down that the server's target has other weights, whose digest nobody computed."""
        launch = self._launch
        event = TargetChanged(
            time_s=time.time(),
            from_digest=self.target_digest,
            to_digest=f"{launch.target_digest}+{launch.serve_pid}.{num_updates}",
            num_updates=num_updates,
        )
        self.journal.append(event)
        self.sync()

    def num_target_updates(self) -> int:
        """Updates of the target that the journal knows of, since the server started."""
        count = 0
        for event in self.journal.read():
            if isinstance(event, ServerStarted):
                count = 0
            elif isinstance(event, TargetChanged):
                count = event.num_updates
        return count

    def _retain(self) -> None:
        if notice := self._store.retain(self._config, state_of(self.journal.read())).notice:
            print(f"onlinespec sidecar: {notice}", flush=True)
