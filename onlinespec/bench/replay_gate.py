"""The gate in a replay: the same sides, race, slices, patience and error budget as in the sidecar.

What `promote.Promoter` does with sockets, files and a trial is left out: a candidate that won its race is in service
with the next request. The trial refuses what hurts the server, which a replay has not, and it costs time, so a live
promotion comes later by the trial's pairs. The guard is left out too: what it takes back would show as a gain here.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import msgspec
import torch

from onlinespec.config import DriftConfig, GateConfig
from onlinespec.draft.config import DraftConfig
from onlinespec.draft.model import Draft
from onlinespec.draft.sample import Sample, VerifySteps
from onlinespec.draft.walk import accept_walk, matches_each
from onlinespec.gate.budget import candidate_alpha, may_start
from onlinespec.gate.patience import Patience
from onlinespec.gate.race import Race
from onlinespec.gate.slices import slice_labels
from onlinespec.gate.verdict import fidelity_of
from onlinespec.sides import Side, Sides
from onlinespec.trainer.drift import Drift
from onlinespec.watch import walked


@dataclass(frozen=True)
class Shape:
    """What every walk of a replay needs. Shapes: embed_VD the target's embedding table."""

    draft_config: DraftConfig
    embed_VD: torch.Tensor
    num_draft_steps: int


class ReplayVerdict(msgspec.Struct, frozen=True):
    """How a race ended."""

    time_s: float
    """of the replayed stream"""
    decision: str
    reason: str
    num_requests: int
    mean_gain_tokens: float


class ReplayGate:
    """One candidate at a time. Times are those of the stream's samples, in seconds."""

    def __init__(self, config: GateConfig, drift: DriftConfig, shape: Shape, incumbent: Draft, seed: int):
        self.incumbent = incumbent
        self.num_candidates = 0
        self.verdicts: list[ReplayVerdict] = []
        self._config = config
        self._shape = shape
        self._sides = Sides(seed.to_bytes(16, "little"), config)
        self._candidate: Draft | None = None
        self._race: Race | None = None
        self._races: list[tuple[float, float]] = []
        self._patience = Patience(config)
        self._drift = Drift(drift)
        self._num_promotions = 0

    def side(self, sample: Sample) -> tuple[Sample, Side]:
        """As in the sidecar. A recording's groups are its conversations; without them each prompt is one."""
        opening = list(sample.group) or sample.tokens_T[: sample.num_prompt_tokens].tolist()
        return self._sides.side(sample, opening, is_first_turn=True)

    def train(self, sample: Sample) -> None:
        self._sides.train(sample)

    def may_offer(self, now_s: float) -> bool:
        """The error budget allows a race, and none is under way, or one that has stalled and has to make room."""
        if not may_start(now_s, self._races, self._config):
            return False
        return self._race is None or self._race.is_stalled(self._patience.within(self._race.alpha))

    def offer(self, weights: dict[str, torch.Tensor], now_s: float) -> None:
        """Begin a race for these weights, where `may_offer`."""
        if self._race is not None:
            self._race.withdraw("it stalled and a newer candidate waits", now_s=now_s)
            self._conclude(now_s)
            self._patience.cut_short()
        alpha = candidate_alpha(now_s, self._races, self._config)
        self._races.append((now_s, alpha))
        self.num_candidates += 1
        self._candidate = Draft(self._shape.draft_config, weights)
        name = f"candidate {self.num_candidates}"
        self._race = Race(
            name,
            "incumbent",
            self._shape.num_draft_steps,
            alpha,
            self._config,
            frozen_at_s=now_s,
            was_trained_on=self._sides.was_trained_on,
        )

    def observe(self, sample: Sample, cluster: int | None, clusters: Collection[int]) -> bool:
        """Walk a request that judges with both drafts; True where this promotes the candidate, the incumbent now.

        cluster: the task cluster it belongs to, of all there are; None before there are any.
        """
        race = self._race
        if race is not None and sample.ended_s - race.frozen_at_s > self._config.max_race_s:
            race.withdraw("undecided for too long", now_s=sample.ended_s)
            self._conclude(sample.ended_s)
            return False
        if race is None or sample.missing_prompt_frac > self._config.max_missing_frac:
            return False
        if not race.admits(sample.started_s, sample.group, sample.answer_key):
            return False
        assert self._candidate is not None
        num_steps, end = self._shape.num_draft_steps, sample.num_tokens - 1
        found = matches_each([self.incumbent, self._candidate], sample, self._shape.embed_VD, num_steps)
        incumbent, candidate = (accept_walk(matches, sample.num_prompt_tokens, end, num_steps) for matches in found)
        if self._has_drifted(cluster, clusters, incumbent):
            self._patience.drifted()
            if race.is_of_the_past:
                race.withdraw("acceptance fell since it began", now_s=sample.ended_s)
                return self._conclude(sample.ended_s)
        verdict = race.observe(
            sample.request,
            walked(incumbent, end, num_steps),
            walked(candidate, end, num_steps),
            sample.group,
            started_s=sample.started_s,
            now_s=sample.ended_s,
            fidelity=fidelity_of(
                has_swap=False,  # rows say nothing of a draft: in a replay none was swapped inside a request
                is_complete=sample.is_complete,
                num_completed_rows=sample.num_completed_rows,
            ),
            slices=slice_labels(sample.tenant, cluster, sample.num_answer_tokens, sample.temperature),
        )
        return verdict is not None and self._conclude(sample.ended_s)

    def _has_drifted(self, cluster: int | None, clusters: Collection[int], steps: VerifySteps) -> bool:
        """On the requests of races; the sidecar watches all."""
        if cluster is None:
            return False
        self._drift.keep_only(clusters)
        served = replace(steps, version=[self._num_promotions] * len(steps))
        return any(event.kind != "mix" for event in self._drift.observe(cluster, served, self._num_promotions))

    def _conclude(self, now_s: float) -> bool:
        """Of the race that has its verdict; True where the candidate is the incumbent now."""
        race, candidate, self._race, self._candidate = self._race, self._candidate, None, None
        assert race is not None
        assert race.verdict is not None
        assert candidate is not None
        verdict = race.verdict
        told = ReplayVerdict(now_s, verdict.decision, verdict.reason, verdict.num_requests, verdict.mean_gain_tokens)
        self.verdicts.append(told)
        is_promoted = verdict.decision == "promote"
        if is_promoted:
            self.incumbent = candidate
            self._num_promotions += 1
            self._patience.promoted(verdict.num_requests)
        return is_promoted
