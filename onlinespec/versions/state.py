"""What follows from the journal: the state a restart resumes from, and what may be done in it. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from onlinespec.errors import VersionError
from onlinespec.versions.journal import (
    AnyEvent,
    By,
    DepthChanged,
    Judged,
    Paused,
    Pinned,
    Promoted,
    Published,
    RaceStarted,
    Resumed,
    RolledBack,
    ServerStarted,
    TargetChanged,
    Unpinned,
)


class JournalState(msgspec.Struct, frozen=True, kw_only=True):
    """What a restart resumes from."""

    incumbent: int | None = None
    """version in service; None before the first server came up"""
    previous: int | None = None
    """version a plain rollback returns to; None where there is none that is not barred"""
    pinned: int | None = None
    """version an operator pinned; None where none is"""
    is_paused: bool = False
    """an operator paused the gate"""
    barred: frozenset[str] = frozenset()
    """digests of weights that were rolled back"""
    num_promotions: int = 0
    """promotions the gate decided for this target: what its error budget counts"""
    num_candidates: int = 0
    """races begun for this target, those a crash cut short included"""
    promoted: tuple[int, ...] = ()
    """versions the gate ever promoted, in that order, each once"""
    digests: dict[int, str] = {}
    """digest of every version ever published"""
    parents: dict[int, int] = {}
    """version the training went on from, of every version that has one"""
    target_digest: str | None = None
    """of the target the server changed to last; None where it never changed: it is the one it started with"""
    updated_from: int | None = None
    """version in service when the server's target was first updated: a restart, on the target's files, returns to it
    where later ones were learned on the update; None where no update holds"""
    num_steps: int | None = None
    """draft steps set since the server started; None where it drafts as it was started"""

    @property
    def hold(self) -> str | None:
        """Why the gate may promote nothing now; None where it may."""
        if self.pinned is not None:
            return f"version {self.pinned} is pinned"
        return "the gate is paused" if self.is_paused else None

    @property
    def protected(self) -> frozenset[int]:
        """Versions never deleted: the incumbent, its parent, what a rollback or restart returns to, the pin."""
        parent = None if self.incumbent is None else self.parents.get(self.incumbent)
        named = (self.incumbent, parent, self.previous, self.updated_from, self.pinned)
        return frozenset(version for version in named if version is not None)

    @property
    def ancestors(self) -> tuple[int, ...]:
        """What the incumbent was trained from, newest first, but for what is barred."""
        line = []
        version = self.incumbent
        while version is not None and (version := self.parents.get(version)) is not None:
            if self.digests.get(version) not in self.barred:
                line.append(version)
        return tuple(line)


@dataclass
class _Fold:
    """The state under way."""

    served: list[int] = field(default_factory=list)
    """a stack: a rollback takes off what came after the version it returns to"""
    digests: dict[int, str] = field(default_factory=dict)
    parents: dict[int, int] = field(default_factory=dict)
    barred: set[str] = field(default_factory=set)
    promoted: list[int] = field(default_factory=list)
    num_promotions: int = 0
    num_candidates: int = 0
    racing: str | None = None
    pinned: int | None = None
    is_paused: bool = False
    target_digest: str | None = None
    updated_from: int | None = None
    num_steps: int | None = None

    def take(self, event: AnyEvent) -> None:
        match event:
            case Published():
                self.digests[event.version] = event.digest
                if event.parent is not None:
                    self.parents[event.version] = event.parent
            case RaceStarted():
                self.num_candidates += 1
                self.racing = event.candidate_digest
            case Judged(verdict={"stage": "sound"}):
                pass  # no race was begun
            case Judged():
                self.num_candidates += event.candidate_digest != self.racing
                self.racing = None
            case Promoted():
                self._promote(event)
            case RolledBack():
                self._roll_back(event)
            case ServerStarted():
                self._serve(event.version)
                self.num_steps = None
            case DepthChanged():
                self.num_steps = event.num_steps
            case TargetChanged():
                self._change_target(event)
            case Pinned():
                self.pinned = event.version
            case Unpinned():
                self.pinned = None
            case Paused() | Resumed():
                self.is_paused = isinstance(event, Paused)

    def _serve(self, version: int) -> None:
        if not self.served or self.served[-1] != version:
            self.served.append(version)

    def _promote(self, event: Promoted) -> None:
        self._serve(event.version)
        if event.by == "operator":
            self.barred.discard(self.digests.get(event.version, ""))
        elif event.by == "gate":
            self.num_promotions += 1
            if event.version not in self.promoted:
                self.promoted.append(event.version)
            if event.from_version is not None:
                # Journals older than `Published.parent` say it here: a candidate is trained from the incumbent.
                self.parents.setdefault(event.version, event.from_version)

    def _roll_back(self, event: RolledBack) -> None:
        """Forget what came after `to_version`; one that was never in service is entered on top."""
        if event.by == "serve":
            self.served = [version for version in self.served if version != event.from_version]
        if event.to_version in self.served:
            del self.served[len(self.served) - self.served[::-1].index(event.to_version) :]
        else:
            self.served.append(event.to_version)
        if event.barred_digest:
            self.barred.add(event.barred_digest)
        if event.by == "operator":
            self.barred.discard(self.digests.get(event.to_version, ""))

    def _change_target(self, event: TargetChanged) -> None:
        """The version in service stays, to be measured anew; what came before it was for another target."""
        self.target_digest = event.to_digest
        self.served = self.served[-1:]
        if not event.num_updates:
            self.updated_from = None
        elif self.updated_from is None and self.served:
            self.updated_from = self.served[-1]
        self.num_promotions = self.num_candidates = 0
        self.racing = None


def state_of(events: Iterable[AnyEvent]) -> JournalState:
    """Fold events, oldest first, into the state they leave."""
    fold = _Fold()
    for event in events:
        fold.take(event)
    earlier = [version for version in fold.served[:-1] if fold.digests.get(version) not in fold.barred]
    return JournalState(
        incumbent=fold.served[-1] if fold.served else None,
        previous=earlier[-1] if earlier else None,
        pinned=fold.pinned,
        is_paused=fold.is_paused,
        barred=frozenset(fold.barred),
        num_promotions=fold.num_promotions,
        num_candidates=fold.num_candidates,
        promoted=tuple(fold.promoted),
        digests=fold.digests,
        parents=fold.parents,
        target_digest=fold.target_digest,
        updated_from=fold.updated_from,
        num_steps=fold.num_steps,
    )


def check_pin(state: JournalState, to_version: int | None) -> None:
    """Raises: VersionError where a pin keeps `to_version` (None: any other than the incumbent) out of service."""
    if state.pinned is not None and to_version != state.pinned:
        asked = "the version before it" if to_version is None else f"version {to_version}"
        raise VersionError(
            f"version {state.pinned} is pinned and {asked} cannot be put in service; run `onlinespec unpin` first"
        )


def rollback_from(state: JournalState, to_version: int | None, by: By, time_s: float, reason: str = "") -> RolledBack:
    """Build the event of a rollback: where it goes, and what it bars.

    `to_version` None means the version before the incumbent. Going back bars the weights that are left;
    going forward, to a higher number, bars nothing, and so does leaving a version whose `Published` a crash
    kept from the journal. An operator's word outranks the gate: the version an
    operator names is un-barred by it.

    Raises: VersionError where there is nothing to leave or to return to.
    """
    if state.incumbent is None:
        raise VersionError("no version is in service: nothing to roll back; start the server first")
    to = state.previous if to_version is None else to_version
    if to is None:
        raise VersionError(
            f"nothing was in service before version {state.incumbent}; name a version with rollback --to N"
        )
    if to == state.incumbent:
        raise VersionError(f"version {to} is already in service; name another with rollback --to N")
    barred = state.digests.get(state.incumbent) if to < state.incumbent else None
    return RolledBack(
        time_s=time_s, from_version=state.incumbent, to_version=to, by=by, barred_digest=barred, reason=reason
    )
