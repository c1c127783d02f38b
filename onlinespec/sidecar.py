"""Composition root of the trainer process, and its one loop: receive, train, judge, report.

It may die at any moment. What it needs to go on is on disk: versions, the journal, the holdout key, and the
trainer's checkpoint; its buffers are rebuilt from the stream. Nothing here is caught: a fault ends the
process and the supervisor starts it again.
"""

import json
import math
import os
import secrets
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import msgspec
import torch

from onlinespec.config import Config
from onlinespec.courtesy import step_back
from onlinespec.draft.config import read_target
from onlinespec.draft.header import aux_layers
from onlinespec.draft.place import bound_memory
from onlinespec.draft.sample import Sample
from onlinespec.gate.holdout import first_user_span
from onlinespec.gate.verdict import Verdict
from onlinespec.intake import Intake
from onlinespec.launch import read_launch
from onlinespec.paths import RunPaths
from onlinespec.promote import Promoter
from onlinespec.record.live import LiveRecording
from onlinespec.record.manifest import RowFacts
from onlinespec.resolve import load_config
from onlinespec.sides import Sides
from onlinespec.target import ServedTarget
from onlinespec.trainer.cluster import pooled
from onlinespec.trainer.drift import Drift
from onlinespec.trainer.learner import Learner
from onlinespec.trainer.pace import Pace
from onlinespec.versions.durable import sync_path
from onlinespec.versions.manifest import Provenance
from onlinespec.wire.messages import (
    BlockEnded,
    GetHello,
    Heartbeat,
    Hello,
    RequestEnded,
    RequestStarted,
    SampleMessage,
    SetCapture,
)
from onlinespec.wire.sockets import ControlClient

_KEY_BYTES = 32
_MAX_TENANTS = 1000
_RECEIVE_SLICE_S = 1.0
"""longest turn of receiving before a step has its turn: several steps' time, so that training never starves judging"""
_STATUS_S = 1.0
_SAVES_APART = 20.0
"""times what a checkpoint took: nothing is received or judged meanwhile, and that of an 8B target's draft is 5.6 GB"""
_STATE_FORMAT = 3
"""of the checkpoint; one of another format is not resumed from"""


def holdout_key(path: Path) -> bytes:
    """The run directory's secret, made at first use: a client cannot choose the side its traffic falls on."""
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
    return path.read_bytes()


class Sidecar:
    """See the module's docstring."""

    def __init__(self, root: Path):
        self._paths = RunPaths(root)
        self._config: Config = load_config([self._paths.resolved_config])
        launch = read_launch(root)
        self._control = ControlClient(self._paths.control_endpoint)
        hello = self._control.request(GetHello())
        assert isinstance(hello, Hello), hello
        self._generation_prompt = hello.generation_prompt
        self._sides = Sides(holdout_key(self._paths.holdout_key), self._config.gate)
        self.counters: Counter[str] = Counter()
        self._tenants: set[str] = set()
        self._target = ServedTarget(launch.model, self._paths.exported_target, self._control)
        embed_VD = self._target.embed_VD
        self.promoter = Promoter(
            self._paths,
            self._config,
            launch,
            self._control,
            hello,
            embed_VD,
            self._sides.was_trained_on,
        )
        self.service = self.promoter.service
        weights = self.service.draft.weights()
        self.learner = Learner(self._config, self.service.draft_config, weights, embed_VD, self.service.is_fresh)
        self.trainer = self.learner.trainer
        facts = RowFacts(
            target_digest=launch.target_digest,
            hidden_size=hello.hidden_size,
            aux_layers=tuple(aux_layers(self.service.draft_config, read_target(launch.model).num_layers)),
            teacher_top_k=self._config.capture.teacher_top_k,
        )
        self._recording = LiveRecording(
            self._paths.record_request, launch.serve_pid, facts, self._config.record.shard_bytes
        )
        self._intake = Intake(self._paths.samples_endpoint, self._config.buffer)
        self._frozen_at_step = 0
        self._last_loss = float("nan")
        self._server_counters: dict[str, int] = {}
        self._pace = Pace(self._config.pace, time.monotonic())
        self._drift = Drift(self._config.drift)
        self._capture_frac: float | None = None
        self._noted_verdict: Verdict | None = None
        self._saved_version = self.service.version
        self._save_every_s = self._config.trainer.checkpoint_s
        self._is_stopped = False
        self._resume()
        if self._target.num_updates > self.service.num_target_updates():
            self._forget_target()

    def run(self) -> None:
        """Until SIGTERM or SIGINT; then the trainer's state is saved."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        reported_s = saved_s = time.monotonic()
        while not self._is_stopped:
            self._receive(0.0 if self._may_train() else 0.05)
            self.promoter.sync()
            if self.promoter.has_moved:
                self._follow_operator()
            self._train()
            self._steer()
            now_s = time.monotonic()
            if now_s - reported_s >= _STATUS_S:
                reported_s = now_s
                self._intake.assembler.expire(time.time())
                self.learner.buffer.expire(time.time())
                self._keep_watch(time.time())
                self._recording.poll(time.time())
                self._report()
            if now_s - saved_s >= self._save_every_s or self.service.version != self._saved_version:
                saved_s = now_s
                self._save()
        self._save()
        self._recording.close()
        self._intake.close()
        self._report()

    def _stop(self, _number: int, _frame: object) -> None:
        self._is_stopped = True

    def _receive(self, timeout_s: float) -> None:
        """Take what waits, for a slice of time; wait for the first message only."""
        until_s = time.monotonic() + _RECEIVE_SLICE_S
        while not self._is_stopped and time.monotonic() < until_s:
            message = self._intake.next_message(timeout_s)
            if message is None:
                return
            self._handle(message)
            timeout_s = 0.0

    def _handle(self, message: SampleMessage) -> None:
        match message:
            case RequestStarted():
                self._heed_target(message.target_updates)
                self._intake.assembler.start(message)
            case RequestEnded():
                self._heed_target(message.target_updates)
                self.counters["verify_steps"] += message.num_verify_steps
                self.counters["correct_drafts"] += message.num_correct_drafts
                sample = self._intake.assembler.end(message)
                if sample is not None:
                    self._file(sample)
            case BlockEnded():
                self.promoter.block(message)
            case Heartbeat():
                self._heed(message)

    def _heed(self, message: Heartbeat) -> None:
        """The server's own word: what it serves, what its steps cost, whether its target is what it was."""
        self._server_counters = message.counters
        self.promoter.depth.costs(message.counters, time.monotonic())
        self._heed_target(message.counters.get("target_updates", 0))
        if self._target.missing:
            self._target.follow(self._target.num_updates)
        if message.version != self.service.version:
            self.service.reconcile()

    def _heed_target(self, num_updates: int) -> None:
        """The first message after an update of the target's weights tells of it, before any row of the new ones."""
        if num_updates > self._target.num_updates:
            self._target.follow(num_updates)
            self._forget_target()

    def _forget_target(self) -> None:
        """Rows of the old target, and what was shown on them, say nothing of the new one."""
        print("onlinespec sidecar: the target's weights changed; rows and evidence are dropped", flush=True)
        self.promoter.change_target(self._target.num_updates)
        self._recording.end_for_good("the target's weights changed: its files are not what the rows are of any more")
        self._intake.assembler.clear()
        self.learner.buffer.clear()
        self._drift = Drift(self._config.drift)
        self._frozen_at_step = self.trainer.num_steps

    def _keep_watch(self, now_s: float) -> None:
        """Once a second: what waits for too little traffic ends, an offer is taken, the depth follows its cost."""
        self.promoter.expire(now_s)
        self.promoter.take_offer()
        if self.promoter.trial is None:
            self.promoter.depth.keep(self._server_counters.get("running_requests", 0), time.monotonic())

    def _file(self, sample: Sample) -> None:
        """Judge with it, then train on it, as its side says.

        All are watched for drift; only what is trained on shapes the clusters. Without the target's embedding
        table nothing can be said of a draft, and the gate waits.
        """
        if self._target.missing:
            self.counters["samples_without_embedding"] += 1
            return
        prompt = sample.tokens_T[: sample.num_prompt_tokens].tolist()
        span, is_first_turn = first_user_span(prompt, self._generation_prompt)
        sample, side = self._sides.side(sample, prompt[:span], is_first_turn)
        cluster = None
        if side.is_judge or not side.trains:
            cluster = self.learner.buffer.clusters.nearest(pooled(sample.aux_TA, sample.has_aux_T))
        verdict = self.promoter.observe(sample, cluster, side.is_judge)
        self.counters["judging_samples"] += side.is_judge
        self.counters["heldout_samples"] += not side.trains
        if side.trains:
            cluster = self._learn(sample)
        self._watch(sample, cluster)
        if verdict is not None:
            self.counters[f"verdicts_{verdict.decision}"] += 1
            self._save()

    def _learn(self, sample: Sample) -> int:
        """From here on the conversation judges no candidate; its task cluster."""
        self.counters["training_samples"] += 1
        self._tenants.add(sample.tenant if len(self._tenants) < _MAX_TENANTS else "(more)")
        self._sides.train(sample)
        self._recording.add(sample)
        return self.learner.add(sample, time.time())

    def _watch(self, sample: Sample, cluster: int | None) -> None:
        """Drift restores full training and capture at once; a mere change of the mix does not."""
        if cluster is None:
            return
        self._drift.keep_only(self.learner.buffer.clusters.ids)
        for event in self._drift.observe(cluster, sample.verify, self.service.version):
            print(f"onlinespec sidecar: {event}", flush=True)
            if event.kind != "mix":
                self._pace.drifted()
                self.promoter.drifted(time.time())

    def _may_train(self) -> bool:
        running = self._server_counters.get("running_requests", 0)
        return self._pace.may_step(time.monotonic(), self.learner.is_due, running)

    def _steer(self) -> None:
        """Tell the pace of a new verdict, and the server which share of requests to capture where that changed."""
        verdict = self.promoter.last_verdict
        if verdict is not None and verdict is not self._noted_verdict:
            self._noted_verdict = verdict
            # A race given up for want of traffic says nothing; nor does a gain that a newer candidate was let past.
            gate = self._config.gate
            has_gained = verdict.mean_gain_tokens > gate.min_gain_tokens and verdict is self.promoter.cut_short
            if verdict.num_requests >= gate.min_requests and not has_gained:
                self._pace.judged(verdict.decision == "promote")
        wanted = self._pace.capture_frac
        if wanted == self._capture_frac:
            return
        self._capture_frac = wanted
        self._control.acknowledged(SetCapture(sample_frac=wanted))

    def _train(self) -> None:
        """One step where new samples paid for it and the pace allows it, then a candidate where one is due."""
        started_s = time.monotonic()
        result = self.learner.step(time.time()) if self._may_train() else None
        if result is None:
            return
        self.trainer.wait()
        self._pace.stepped(time.monotonic() - started_s)
        self._last_loss = result.loss
        if self.trainer.num_steps - self._frozen_at_step < self._config.gate.candidate_steps:
            return
        self.promoter.give_way(time.time())
        self.promoter.take_offer()  # others' come before its own
        if not self.promoter.is_busy:
            self._frozen_at_step = self.trainer.num_steps
            self.promoter.freeze(self.trainer.weights(), self._provenance())

    def _provenance(self) -> Provenance:
        return Provenance(
            optimizer_steps=self.trainer.num_steps,
            answer_tokens=self.learner.num_tokens,
            seed=self._config.trainer.seed,
            tenants=tuple(sorted(self._tenants)),
        )

    def _follow_operator(self) -> None:
        """Another version came into service: train on from it, not from what was taken back."""
        self.promoter.has_moved = False
        self.trainer.restart(self.service.draft.weights(), self.service.is_fresh)
        self._frozen_at_step = self.trainer.num_steps

    def _resume(self) -> None:
        """From the checkpoint, where it was made for this target and the version that is in service now."""
        if not self._paths.trainer_state.exists():
            return
        saved = torch.load(self._paths.trainer_state, weights_only=True)
        if saved.get("format") != _STATE_FORMAT:
            return
        self._sides.load_state(saved["sides"])  # whatever serves now: earlier versions have learned from these
        if saved["target_digest"] != self.service.target_digest or saved["version"] != self.service.version:
            return
        self.learner.load_state(saved["learner"])
        self._drift.load_state(saved["drift"])
        self._pace.load_saved(saved["pace"])
        self.counters.update(saved["counters"])
        self._tenants.update(saved["tenants"])
        self.promoter.patience.requests = saved["patience_requests"]
        self._frozen_at_step = self.trainer.num_steps
        self.counters["resumes"] += 1

    def _save(self) -> None:
        began_s, self._saved_version = time.monotonic(), self.service.version
        state = {
            "format": _STATE_FORMAT,
            "target_digest": self.service.target_digest,
            "version": self.service.version,
            "learner": self.learner.state(),
            "drift": self._drift.state(),
            "pace": self._pace.saved(),
            "counters": dict(self.counters),
            "tenants": sorted(self._tenants),
            "sides": self._sides.state(),
            "patience_requests": self.promoter.patience.requests,
        }
        temporary = self._paths.trainer_state.with_suffix(".tmp")
        torch.save(state, temporary)
        sync_path(temporary)
        temporary.rename(self._paths.trainer_state)
        self._save_every_s = max(self._config.trainer.checkpoint_s, _SAVES_APART * (time.monotonic() - began_s))

    def _report(self) -> None:
        steps = self.counters["verify_steps"]
        status = {
            "time_s": time.time(),
            **self.promoter.status(),
            "embedding_missing": self._target.missing or None,
            "accept_length": (steps + self.counters["correct_drafts"]) / steps if steps else None,
            "trainer_step": self.trainer.num_steps,
            "training_tokens": self.learner.num_tokens,
            "loss": self._last_loss if math.isfinite(self._last_loss) else None,
            "skipped_steps": self.trainer.num_skipped,
            "buffered_samples": len(self.learner.buffer),
            "pace": self._pace.state,
            "duty_frac": self._pace.duty_frac,
            "capture_frac": self._pace.capture_frac,
            "clusters": self.learner.buffer.cluster_sizes(),
            "drift": self._drift.counters,
            "last_drift": self._drift.last and str(self._drift.last),
            "row_shares": self._intake.assembler.row_shares(),
            "recording": self._recording.progress and msgspec.to_builtins(self._recording.progress),
            "damaged_messages": self._intake.num_damaged,
            **self.counters,
            **{f"assembler_{name}": count for name, count in self._intake.assembler.counters.items()},
            **{f"server_{name}": count for name, count in self._server_counters.items()},
        }
        temporary = self._paths.sidecar_status.with_suffix(".tmp")
        temporary.write_text(json.dumps(status))
        temporary.rename(self._paths.sidecar_status)


def main() -> None:
    """`python -m onlinespec.sidecar RUN_DIR`, started by `serve`."""
    root = Path(sys.argv[1])
    config = load_config([RunPaths(root).resolved_config])
    step_back()
    torch.set_num_threads(config.trainer.num_threads)
    bound_memory(config.trainer.device, config.trainer.max_memory_gb)
    Sidecar(root).run()


if __name__ == "__main__":
    main()
