"""From a frozen candidate to a swap: the gate's one customer.

One candidate at a time. Its weights are frozen as the bytes that would be published, so the digest that is
judged is the digest that is served. A promotion is decided, swapped and written down under the journal's
lock: a rollback by an operator cannot come between.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save

from onlinespec.config import Config
from onlinespec.draft.checkpoint import read_draft, write_draft
from onlinespec.draft.config import DraftConfig
from onlinespec.draft.header import digest_of_bytes
from onlinespec.draft.model import Draft
from onlinespec.draft.sample import Sample, VerifySteps
from onlinespec.draft.walk import accept_walk, matches_each
from onlinespec.gate.budget import candidate_alpha, may_start
from onlinespec.gate.race import Race
from onlinespec.gate.slices import slice_labels
from onlinespec.gate.verdict import Verdict, Walked, barred_reason, fidelity_of
from onlinespec.launch import Launch
from onlinespec.paths import RunPaths
from onlinespec.versions.journal import (
    Journal,
    Judged,
    Promoted,
    Published,
    RaceStarted,
    SwapFailed,
    Withheld,
)
from onlinespec.versions.manifest import Provenance
from onlinespec.versions.state import JournalState, rollback_from, state_of
from onlinespec.versions.store import VersionStore
from onlinespec.wire.messages import GetHello, Hello, Swap
from onlinespec.wire.sockets import ControlClient


@dataclass(frozen=True)
class Candidate:
    """Frozen weights and what shaped them."""

    digest: str
    weights: dict[str, torch.Tensor]
    draft: Draft
    provenance: Provenance


def walked(steps: VerifySteps, end: int, num_steps: int) -> Walked:
    """What an accept walk up to position `end`, the last committed token's, comes to.

    A draft position past the end was never checked and counts as not reached.
    """
    starts = list(zip(steps.start, steps.num_correct, strict=True))
    reached = [sum(correct >= k and start + k < end for start, correct in starts) for k in range(num_steps)]
    matched = [sum(correct > k for _, correct in starts) for k in range(num_steps)]
    return Walked(sum(steps.num_committed), len(steps), tuple(reached), tuple(matched))


class Promoter:
    """Holds the incumbent's shadow and the race under way. Shapes: embed_VD the target's embedding table."""

    def __init__(
        self,
        paths: RunPaths,
        config: Config,
        launch: Launch,
        control: ControlClient,
        embed_VD: torch.Tensor,
        was_trained_on: Callable[[tuple[int, ...]], bool],
    ):
        self.race: Race | None = None
        self.has_moved = False
        """another hand put a version in service since this was last set to False"""
        self.num_incomplete = 0
        """held-out requests that were not walked for want of rows"""
        self.last_verdict: Verdict | None = None
        self._paths = paths
        self._config = config
        self._launch = launch
        self._control = control
        self._embed_VD = embed_VD
        self._was_trained_on = was_trained_on
        self._journal = Journal(paths)
        self._store = VersionStore(paths)
        self._candidate: Candidate | None = None
        self._journal_bytes = -1
        self.state = JournalState()
        self.version = 0
        self.draft_config: DraftConfig
        self._incumbent: Draft
        self._reconcile()
        self.sync()
        self.has_moved = False

    def _reconcile(self) -> None:
        """A crash between the server's ack and the journal's line: the server is right, and is asked under the lock."""
        with self._journal.decision():
            hello = self._control.request(GetHello())
            assert isinstance(hello, Hello), hello
            events = self._journal.read()
            state = state_of(events)
            if state.incumbent in (None, hello.version):
                return
            published = [event.version for event in events if isinstance(event, Published)]
            settled = {event.version for event in events if isinstance(event, Promoted | SwapFailed)}
            if hello.version == published[-1] and hello.version not in settled:
                event = Promoted(time_s=time.time(), version=hello.version, from_version=state.incumbent, by="gate")
                self._journal.append(event)
            else:
                self._journal.append(rollback_from(state, hello.version, "operator", time.time()))

    def sync(self) -> None:
        """Follow the journal: where another hand changed the version in service, its weights are the shadow now."""
        size = self._paths.journal.stat().st_size
        if size == self._journal_bytes:
            return
        self._journal_bytes = size
        self.state = state_of(self._journal.read())
        assert self.state.incumbent is not None, "serve writes the version it started with before the sidecar starts"
        if self.state.incumbent == self.version:
            return
        self.version = self.state.incumbent
        self.draft_config, weights = read_draft(self._paths.version(self.version))
        self._incumbent = Draft(self.draft_config, weights)
        self.race = self._candidate = None
        self.has_moved = True

    def incumbent_weights(self) -> dict[str, torch.Tensor]:
        return self._incumbent.weights()

    def freeze(self, weights: dict[str, torch.Tensor], provenance: Provenance) -> None:
        """Start a race for these weights; barred ones are passed over, and all while paused or over budget."""
        self.sync()
        if self.state.is_paused:
            return
        digest = digest_of_bytes(save(weights))
        incumbent_digest = self.state.digests[self.version]
        if barred_reason(digest, self.state.barred) or digest == incumbent_digest:
            return
        gate, now_s = self._config.gate, time.time()
        races = [(event.time_s, event.alpha) for event in self._journal.read() if isinstance(event, RaceStarted)]
        if not may_start(now_s, races, gate):
            return
        alpha = candidate_alpha(now_s, races, gate)
        self._journal.append(RaceStarted(time_s=now_s, candidate_digest=digest, alpha=alpha))
        self._candidate = Candidate(digest, weights, Draft(self.draft_config, weights), provenance)
        self.race = Race(
            digest,
            incumbent_digest,
            self._launch.num_draft_steps,
            alpha,
            gate,
            frozen_at_s=time.time(),
            was_trained_on=self._was_trained_on,
        )

    def observe(self, sample: Sample, cluster: int | None) -> Verdict | None:
        """Walk a held-out request with both drafts; the verdict where it decides the race.

        cluster: the task cluster it belongs to; None before there are any.
        """
        self.sync()
        if self.race is None or self._candidate is None:
            return None
        if sample.missing_prompt_frac > self._config.gate.max_missing_frac:
            self.num_incomplete += 1
            return None
        if not self.race.admits(sample.started_s, sample.group, sample.answer_key):
            return None
        num_steps, end = self._launch.num_draft_steps, sample.num_tokens - 1
        drafts = [self._incumbent, self._candidate.draft]
        walks = [
            accept_walk(matches, sample.num_prompt_tokens, end, num_steps)
            for matches in matches_each(drafts, sample, self._embed_VD, num_steps)
        ]
        incumbent, candidate = (walked(walk, end, num_steps) for walk in walks)
        verdict = self.race.observe(
            sample.request,
            incumbent,
            candidate,
            sample.group,
            started_s=sample.started_s,
            now_s=time.time(),
            fidelity=fidelity_of(
                has_swap=sample.has_swap,
                is_complete=sample.is_complete,
                num_completed_rows=sample.num_completed_rows,
            ),
            slices=slice_labels(sample.tenant, cluster, sample.num_answer_tokens, sample.temperature),
        )
        if verdict is not None:
            self._conclude(verdict)
        return verdict

    def expire(self, now_s: float) -> None:
        """Give up a race that has found too little traffic."""
        limit_s = self._config.gate.max_race_s
        if self.race is not None and now_s - self.race.frozen_at_s > limit_s:
            self._conclude(self.race.withdraw(f"undecided after {limit_s:.0f} s", now_s=now_s))

    def give_way(self, now_s: float) -> None:
        """Drop a candidate that will not make it at its present pace: a newer one waits."""
        if self.race is not None and self.race.is_stalled:
            gate = self._config.gate
            pace = f"the pace of the last {gate.stall_requests} held-out requests promises no promotion"
            self._conclude(
                self.race.withdraw(f"{pace} within {gate.max_requests}; a newer candidate goes on", now_s=now_s)
            )

    def _conclude(self, verdict: Verdict) -> None:
        candidate, self._candidate, self.race = self._candidate, None, None
        assert candidate is not None
        self.last_verdict = verdict
        evidence = msgspec.to_builtins(verdict)
        self._journal.append(Judged(time_s=time.time(), candidate_digest=candidate.digest, verdict=evidence))
        if verdict.decision == "promote":
            with self._journal.decision():
                self._promote(candidate, evidence)

    def _promote(self, candidate: Candidate, evidence: dict) -> None:
        state = state_of(self._journal.read())
        forbidden = state.hold or barred_reason(candidate.digest, state.barred)
        if state.incumbent != self.version:
            forbidden = f"version {state.incumbent} came into service meanwhile"
        if forbidden:
            self._journal.append(Withheld(time_s=time.time(), candidate_digest=candidate.digest, reason=forbidden))
            return

        def write(folder: Path) -> None:
            write_draft(folder, self.draft_config, candidate.weights)

        self._retain(state)  # first: others may have filled the disk since the last promotion
        manifest = self._store.publish(
            write,
            parent=self.version,
            target_digest=self._launch.target_digest,
            provenance=candidate.provenance,
            created_s=time.time(),
            verdict=evidence,
        )
        assert manifest.digest == candidate.digest, "what was judged is not what was written"
        published = Published(
            time_s=time.time(), version=manifest.version, digest=manifest.digest, parent=manifest.parent
        )
        self._journal.append(published)
        ack = self._control.acknowledged(
            Swap(manifest.version, str(self._paths.version(manifest.version)), manifest.digest)
        )
        if not ack.is_ok:
            self._journal.append(SwapFailed(time_s=time.time(), version=manifest.version, reason=ack.message))
            return
        self._journal.append(
            Promoted(time_s=time.time(), version=manifest.version, from_version=self.version, by="gate")
        )
        self.version = manifest.version
        self._incumbent = candidate.draft
        self._retain(state_of(self._journal.read()))

    def _retain(self, state: JournalState) -> None:
        if notice := self._store.retain(self._config.versions, state).notice:
            print(f"onlinespec sidecar: {notice}", flush=True)
