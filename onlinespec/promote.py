"""From a frozen candidate to a swap, and on watch after it: the gate's one customer.

One candidate at a time: a race on held-out requests, then a trial in live traffic, then promotion. Its weights are
frozen as the bytes that would be published, so the digest that is judged is the digest that is served. What is in
service is watched by the guard, on the same walks.
"""

import time
from collections.abc import Callable

import msgspec
import torch
from safetensors.torch import save

from onlinespec.config import Config
from onlinespec.depth import DepthKeeper
from onlinespec.draft.checkpoint import unsound_reason
from onlinespec.draft.config import read_target
from onlinespec.draft.header import MAP_NAMES, digest_of_bytes
from onlinespec.draft.model import Draft
from onlinespec.draft.sample import Sample
from onlinespec.draft.walk import accept_walk, matches_each
from onlinespec.errors import CheckpointError
from onlinespec.gate.budget import candidate_alpha, may_start
from onlinespec.gate.canary import CanaryVerdict
from onlinespec.gate.guard import GuardVerdict
from onlinespec.gate.lag import Lag
from onlinespec.gate.patience import Patience
from onlinespec.gate.race import Race
from onlinespec.gate.slices import slice_labels
from onlinespec.gate.verdict import Verdict, Walked, barred_reason, fidelity_of
from onlinespec.launch import Launch
from onlinespec.offers import read_offer, take, waiting
from onlinespec.paths import RunPaths
from onlinespec.service import Candidate, Service
from onlinespec.trial import Trial, switchback_order
from onlinespec.versions.journal import CanaryEnded, Judged, RaceStarted, SwapFailed
from onlinespec.versions.manifest import Manifest, Provenance
from onlinespec.watch import Watch, walked
from onlinespec.wire.messages import BlockEnded, Hello, StopSwitchback
from onlinespec.wire.sockets import ControlClient


class Promoter:
    """Holds the race or trial under way, and the guard. Shapes: embed_VD the target's embedding table."""

    def __init__(
        self,
        paths: RunPaths,
        config: Config,
        launch: Launch,
        control: ControlClient,
        hello: Hello,
        embed_VD: torch.Tensor,
        was_trained_on: Callable[[tuple[int, ...]], bool],
    ):
        self.race: Race | None = None
        self.trial: Trial | None = None
        self.watch: Watch | None = None
        self.lag = Lag(config.guard.renew_lag_tokens)
        self.has_moved = False
        """what came into service since this was last set to False is not the trainer's own"""
        self.patience = Patience(config.gate)
        self.num_incomplete = 0
        """requests to judge with that were not walked for want of rows"""
        self.last_verdict: Verdict | None = None
        self.cut_short: Verdict | None = None
        """of the last race that made room for a newer candidate"""
        self.last_refusal = ""
        """of a candidate that got no race; empty where there was none"""
        self.last_trial: CanaryVerdict | None = None
        self.last_harm: GuardVerdict | None = None
        control.acknowledged(StopSwitchback())  # of a sidecar before this one
        self.service = Service(paths, config.versions, launch, control, config.trainer.device)
        starts_at_zero = self.service.is_fresh
        self.depth = DepthKeeper(config.floor, hello, control, self.service.journal, starts_at_zero=starts_at_zero)
        self._config = config
        self._num_draft_steps = launch.num_draft_steps
        self._control = control
        self._paths = paths
        self._launch = launch
        self._embed_VD = embed_VD
        self._was_trained_on = was_trained_on
        self._candidate: Candidate | None = None
        """of the race or of the trial"""
        self._published: Manifest | None = None
        """of the candidate on trial"""
        self._start_watch(self.service.parent())

    @property
    def is_busy(self) -> bool:
        """A candidate is being judged."""
        return self.race is not None or self.trial is not None

    def sync(self) -> None:
        """Follow the journal: where another hand changed the version in service, what was judged is void."""
        was_pinned = self.service.state.pinned is not None
        has_moved = self.service.sync()
        if was_pinned and self.service.state.pinned is None and self.watch is None:
            self._start_watch(self.service.parent())
        hold = self.service.state.hold
        if self.trial is not None and hold:
            self._end_trial(self.trial.canary.withdraw(hold, now_s=time.time()))
        if has_moved:
            self._withdraw(f"version {self.service.version} came into service meanwhile")
            self._moved()

    def _moved(self) -> None:
        self._start_watch(self.service.parent())
        self.depth.forget_accept()
        self.has_moved = True

    def _withdraw(self, reason: str) -> None:
        """End the trial; forget the race, whose level is spent."""
        if self.trial is not None:
            self._end_trial(self.trial.canary.withdraw(reason, now_s=time.time()))
        self.race = self._candidate = None

    def _start_watch(self, parent: tuple[int, Draft] | None) -> None:
        """Guard the version in service against its parent, where that is known."""
        self.watch = None
        if self._config.guard.enabled and parent is not None:
            number, draft = parent
            guard, version, num_steps = self._config.guard, self.service.version, self._num_draft_steps
            self.watch = Watch(guard, version, number, draft, num_steps, time.time(), self.lag)

    def take_offer(self) -> None:
        """Judge the next draft that another tool trained, where one waits and a race may begin."""
        if self.is_busy or not waiting(self._paths):
            return
        self.sync()
        if self._level() is None:
            return
        offer = take(self._paths)
        assert offer is not None
        try:
            num_layers = read_target(self._launch.model).num_layers
            weights = read_offer(offer, self.service.draft_config, num_layers)
        except CheckpointError as error:
            reason = str(error).replace(f"{offer.folder}/", "")  # a folder that is gone by the time anyone reads it
            self._refuse(offer.digest, offer.name, f"not sound: {reason}")
            return
        self.freeze(weights, Provenance(optimizer_steps=0, answer_tokens=0, seed=0, tenants=(), source=offer.name))

    def _level(self) -> float | None:
        """What a race that begins now may spend; None where none may: paused, or over budget."""
        now_s, gate = time.time(), self._config.gate
        events = self.service.journal.read()
        races = [(event.time_s, event.alpha) for event in events if isinstance(event, RaceStarted)]
        if self.service.state.is_paused or not may_start(now_s, races, gate):
            return None
        return candidate_alpha(now_s, races, gate)

    def _refuse(self, digest: str, source: str, reason: str) -> None:
        """Write down a candidate that gets no race, and so spends nothing of the error budget."""
        verdict = {"decision": "drop", "stage": "sound", "reason": reason}
        self.service.journal.append(Judged(time_s=time.time(), candidate_digest=digest, verdict=verdict, source=source))
        self.last_refusal = f"{source or digest[:12]}: {reason}"
        print(f"onlinespec sidecar: candidate {self.last_refusal}", flush=True)

    def freeze(self, weights: dict[str, torch.Tensor], provenance: Provenance) -> None:
        """Start a race for these weights. None starts while paused or over budget; what is not sound is refused.

        Of the trainer's own, weights that are barred or in service already are passed over; of offered ones they are
        refused. Weights that are not finite may be the trainer's own too: its steps skip a loss or a gradient that
        is not, but an update of a diverged one may overflow.
        """
        self.sync()
        alpha = self._level()
        if alpha is None:
            return
        state, gate, source = self.service.state, self._config.gate, provenance.source
        digest = digest_of_bytes(save(weights))
        incumbent_digest = state.digests[self.service.version]
        idle = barred_reason(digest, state.barred)
        idle = "these weights are in service already" if digest == incumbent_digest else idle
        if idle:
            if source:
                self._refuse(digest, source, idle)
            return
        served = self.service.draft.weights()
        shapes = {name: tuple(tensor.shape) for name, tensor in served.items()}
        maps = {name: served[name] for name in MAP_NAMES & served.keys()}
        if reason := unsound_reason(weights, shapes, maps):
            self._refuse(digest, source, f"not sound: {reason}")
            return
        self.service.journal.append(
            RaceStarted(time_s=time.time(), candidate_digest=digest, alpha=alpha, source=source)
        )
        self._candidate = Candidate(digest, weights, self.service.shadow(weights), provenance)
        self.race = Race(
            digest,
            incumbent_digest,
            self._num_draft_steps,
            alpha,
            gate,
            frozen_at_s=time.time(),
            was_trained_on=self._was_trained_on,
        )

    def observe(self, sample: Sample, cluster: int | None, is_judge: bool) -> Verdict | None:
        """Walk a finished request once, with every draft it says something of; the verdict where it decides the race.

        cluster: the task cluster it belongs to; None before there are any. is_judge: no draft was trained on its
        conversation.
        """
        self.sync()
        drafts = self._drafts_for(sample, is_judge)
        if not drafts:
            return None
        found = matches_each(list(drafts.values()), sample, self._embed_VD, self._num_draft_steps)
        matches = dict(zip(drafts, found, strict=True))
        if is_judge and self.depth.is_on:
            incumbent = self._walked(matches["incumbent"], sample)
            self.depth.accepted(incumbent.tokens, incumbent.steps)
        if self.watch is not None:
            harm = self.watch.observe(sample, matches["incumbent"], matches.get("parent"), time.time())
            if harm is not None:
                self._roll_back(harm)
                return None
            if self.lag.is_due(self.service.version) and self.service.renew_prefixes(self.lag):
                self.watch.guard.forget_aged()
        return self._observe_race(sample, cluster, matches) if "candidate" in matches else None

    def _drafts_for(self, sample: Sample, is_judge: bool) -> dict[str, Draft]:
        """Who is to walk this request, the incumbent first; none where nobody learns from it."""
        if sample.missing_prompt_frac > self._config.gate.max_missing_frac:
            self.num_incomplete += is_judge
            return {}
        drafts = {}
        if is_judge and self.watch is not None:
            drafts["parent"] = self.watch.parent
        if is_judge and self._candidate is not None and self._is_admitted(sample):
            drafts["candidate"] = self._candidate.draft
        is_wanted = drafts or self.watch is not None or (is_judge and self.depth.is_on)
        return {"incumbent": self.service.draft, **drafts} if is_wanted else {}

    def _is_admitted(self, sample: Sample) -> bool:
        return self.race is not None and self.race.admits(sample.started_s, sample.group, sample.answer_key)

    def _walked(self, matches_RK: torch.Tensor, sample: Sample) -> Walked:
        num_steps, end = self._num_draft_steps, sample.num_tokens - 1
        return walked(accept_walk(matches_RK, sample.num_prompt_tokens, end, num_steps), end, num_steps)

    def _observe_race(self, sample: Sample, cluster: int | None, matches: dict[str, torch.Tensor]) -> Verdict | None:
        assert self.race is not None
        verdict = self.race.observe(
            sample.request,
            self._walked(matches["incumbent"], sample),
            self._walked(matches["candidate"], sample),
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

    def drifted(self, now_s: float) -> None:
        """Acceptance fell: what was shown, how long a race may take, and what is accepted are of other traffic."""
        self.patience.drifted()
        self.depth.forget_accept()
        if self.race is not None and self.race.is_of_the_past:
            self._cut_short("acceptance fell since it began", now_s)

    def expire(self, now_s: float) -> None:
        """Give up a race or a trial that has found too little traffic."""
        if self.trial is not None and (withdrawn := self.trial.canary.expire(now_s)) is not None:
            self._end_trial(withdrawn)
        limit_s = self._config.gate.max_race_s
        if self.race is not None and now_s - self.race.frozen_at_s > limit_s:
            self._conclude(self.race.withdraw(f"undecided after {limit_s:.0f} s", now_s=now_s))

    def give_way(self, now_s: float) -> None:
        """Drop a candidate that will not make it soon at its present pace: a newer one waits, and may be judged."""
        within = self.patience.within(self.race.alpha) if self.race is not None else 0
        if self.race is not None and self.race.is_stalled(within) and self._level() is not None:
            self._cut_short(f"its pace promises no promotion within {within} held-out requests", now_s)
            self.patience.cut_short()

    def _cut_short(self, reason: str, now_s: float) -> None:
        assert self.race is not None
        self.cut_short = self.race.withdraw(f"{reason}; a newer candidate goes on", now_s=now_s)
        self._conclude(self.cut_short)

    def _conclude(self, verdict: Verdict) -> None:
        candidate, self._candidate, self.race = self._candidate, None, None
        assert candidate is not None
        self.last_verdict = verdict
        evidence = msgspec.to_builtins(verdict)
        source = candidate.provenance.source
        self.service.journal.append(
            Judged(time_s=time.time(), candidate_digest=candidate.digest, verdict=evidence, source=source)
        )
        if verdict.decision != "promote" or self.service.is_forbidden(candidate):
            return
        manifest = self.service.publish(candidate, evidence)
        if self._config.canary.enabled and self.depth.settle():
            self._start_trial(candidate, manifest)
        else:
            self._promote(candidate, manifest)

    def _start_trial(self, candidate: Candidate, manifest: Manifest) -> None:
        config, version = self._config, manifest.version
        order = switchback_order(config.canary, version, self.service.weights_path(version), manifest.digest)
        trial = Trial(
            self._control,
            config.canary,
            order,
            self.service.version,
            self._num_draft_steps,
            is_kv_stable=config.trainer.kv_mode == "stable" and not config.trainer.kv_free_steps,
            now_s=time.time(),
        )
        ack = trial.start()
        if not ack.is_ok:
            self.service.journal.append(SwapFailed(time_s=time.time(), version=version, reason=ack.message))
            return
        self.trial, self._candidate, self._published = trial, candidate, manifest

    def block(self, message: BlockEnded) -> None:
        """Take a block of the trial; promote or refuse where it decides."""
        self.sync()
        if self.trial is not None and (verdict := self.trial.observe(message, time.time())) is not None:
            self._end_trial(verdict)

    def _end_trial(self, verdict: CanaryVerdict) -> None:
        trial, candidate, manifest = self.trial, self._candidate, self._published
        assert trial is not None
        assert candidate is not None
        assert manifest is not None
        self.trial = self._candidate = self._published = None
        self.last_trial = verdict
        trial.stop()
        evidence = msgspec.to_builtins(verdict)
        event = CanaryEnded(time_s=time.time(), version=trial.version, decision=verdict.outcome, evidence=evidence)
        self.service.journal.append(event)
        if verdict.is_passed:
            self._promote(candidate, manifest)

    def _promote(self, candidate: Candidate, manifest: Manifest) -> None:
        parent = self.service.version, self.service.draft
        if self.service.promote(candidate, manifest):
            self._start_watch(parent)
            self.depth.forget_accept()
            if candidate.provenance.source:
                self.has_moved = True  # another tool's: the trainer has to go on from it
            if self.last_verdict is not None:
                self.patience.promoted(self.last_verdict.num_requests)
                self.depth.accepted(self.last_verdict.candidate.tokens, self.last_verdict.candidate.steps)

    def _roll_back(self, harm: GuardVerdict) -> None:
        """Carried out or not, the guard's watch of this version is over; an unpinned version is watched anew."""
        self.last_harm = harm
        refusal = self.service.roll_back(harm)
        outcome = f"not rolled back: {refusal}" if refusal else "rolled back"
        print(f"onlinespec sidecar: version {harm.version} {outcome}; {harm.reason}", flush=True)
        self.watch = None
        self.sync()

    def change_target(self, num_updates: int) -> None:
        """The server's target has other weights: what was shown was shown of another target."""
        self.sync()
        self._withdraw("the target's weights changed")
        self.service.change_target(num_updates)
        self._start_watch(self.service.parent())
        self.depth.forget_accept()

    def status(self) -> dict[str, object]:
        """What is being judged and watched, for people; JSON-able."""
        race, trial = self.race, self.trial
        verdict, canary, harm, wanted = self.last_verdict, self.last_trial, self.last_harm, self.depth.wanted
        return {
            "version": self.service.version,
            "candidates": self.service.state.num_candidates,
            "promotions": self.service.state.num_promotions,
            "race": race
            and {
                "requests": race.num_requests,
                "mean_gain": race.mean_gain_tokens,
                "e_value": race.e_value,
                "threshold": 1 / race.alpha,
                "patience_requests": self.patience.requests,
            },
            "trial": trial and {"version": trial.version, "pairs": trial.canary.num_pairs},
            "guard": self.watch and self.watch.status(),
            "depth": wanted.reason if wanted else self.depth.num_steps,
            "last_verdict": verdict and f"{verdict.decision}: {verdict.reason}",
            "last_refusal": self.last_refusal or None,
            "last_trial": canary and f"{canary.outcome}: {canary.reason}",
            "last_harm": harm and harm.reason,
            "judging_incomplete": self.num_incomplete,
        }
