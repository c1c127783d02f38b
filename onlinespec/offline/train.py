"""`onlinespec train`: a draft from a recording, through the same learner as online, and deterministic.

The clock is the recording's: a sample arrives when its request ended. Given the same recording, draft and config the
losses are the same, bit for bit on one machine, whether the run was killed and resumed or not: a checkpoint holds
the learner's state and the place in the stream, and what the log holds beyond it is cut off.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import torch

import onlinespec
from onlinespec.config import Config
from onlinespec.draft.checkpoint import write_draft
from onlinespec.draft.config import DraftConfig, read_target
from onlinespec.draft.fresh import read_embedding
from onlinespec.draft.header import aux_layers, digest, target_digest
from onlinespec.draft.model import Draft
from onlinespec.draft.sample import Sample
from onlinespec.draft.start import is_fresh, read_start
from onlinespec.draft.walk import walk
from onlinespec.errors import TrainError
from onlinespec.offline.report import Reporter, Target, build_reporter
from onlinespec.offline.stream import Stream, survey
from onlinespec.record.manifest import RowFacts, check_facts
from onlinespec.record.reader import Recording
from onlinespec.trainer.learner import Learner
from onlinespec.trainer.step import StepResult
from onlinespec.versions.durable import sync_path, sync_tree

_CHECKPOINT_FILE = "checkpoint.pt"
_LOG_FILE = "losses.jsonl"
_REPORT_FILE = "report.json"
_DRAFT = "draft"


@dataclass(frozen=True)
class TrainPlan:
    """What a user asked for. draft: see `draft.start`."""

    recording: Path
    target: Path
    draft: str
    out: Path
    config: Config
    epochs: int = 1
    eval_frac: float = 0.1
    """share of conversations never trained on"""
    eval_samples: int = 64
    """of those, how many are walked at an evaluation"""
    eval_steps: int = 200
    """optimizer steps between evaluations"""
    num_draft_steps: int = 3
    """draft tokens per verify step of the server the draft is for"""
    is_resumed: bool = False
    report_to: Target = "none"
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """accept_length: tokens per verify step over all evaluated requests; None where there are none."""

    step: int
    num_tokens: int
    accept_length: float | None


@dataclass(frozen=True)
class Now:
    """Where a training stands. place and num_places count samples of all epochs."""

    place: int
    num_places: int
    step: int
    loss: float
    num_tokens: int
    evaluation: Evaluation | None


class Training:
    """One run. Everything that can be refused is refused here, before the first step."""

    def __init__(self, plan: TrainPlan):
        """Raises: TrainError, RecordError, CheckpointError naming what does not fit."""
        self.plan = plan
        if not plan.config.trainer.enabled:
            raise TrainError("trainer.enabled is false, wanted true to train; drop it from the config")
        self.recording = Recording(plan.recording)
        self._draft_config, weights = self._read_draft()
        gate = plan.config.gate
        self.survey = survey(self.recording, plan.eval_frac, plan.eval_samples, gate.max_missing_frac)
        self._embed_VD = read_embedding(plan.target)
        is_free = is_fresh(plan.draft) or plan.config.trainer.kv_mode == "auto"  # no server holds KV of this draft
        self._learner = Learner(plan.config, self._draft_config, weights, self._embed_VD, is_free)
        self._stream = Stream(self.recording, plan.eval_frac, plan.epochs, self.survey.span_s)
        self._settings = self._identity()
        self._place = 0
        self._log_bytes = 0
        self.evaluations: list[Evaluation] = []
        self.last_loss = math.nan
        self.has_resumed = False
        try:
            plan.out.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise TrainError(f"--out {plan.out}: {error.strerror}; give a directory that can be made") from error
        self._resume()

    def _read_draft(self) -> tuple[DraftConfig, dict[str, torch.Tensor]]:
        """The draft to begin with, once it fits the target and both fit the recording."""
        plan, target = self.plan, read_target(self.plan.target)
        draft_config, weights = read_start(plan.draft, plan.target, plan.config.trainer.seed)
        found = self.recording.manifest.facts
        wanted = RowFacts(
            target_digest=target_digest(plan.target),
            hidden_size=target.hidden_size,
            aux_layers=tuple(aux_layers(draft_config, target.num_layers)),
            teacher_top_k=found.teacher_top_k,
        )
        check_facts(plan.recording, found, wanted, "give the target and a draft that the recording was made for")
        return draft_config, weights

    def _identity(self) -> dict[str, str]:
        """What a resumed run must share with the one that was killed, by name."""
        plan = self.plan
        config = msgspec.to_builtins(plan.config)
        config["trainer"].pop("checkpoint_s")
        fields = {f"{section}.{name}": str(value) for section in config for name, value in config[section].items()}
        return fields | {
            "--recording": self.recording.digest,
            "the draft's config.json": json.dumps(self._draft_config.to_json(), sort_keys=True),
            "--draft": plan.draft if is_fresh(plan.draft) else digest(plan.draft),
            "--eval-frac": str(plan.eval_frac),
            "--eval-samples": str(plan.eval_samples),
            "--eval-steps": str(plan.eval_steps),
            "--draft-steps": str(plan.num_draft_steps),
        }

    def _resume(self) -> None:
        checkpoint, log = self.plan.out / _CHECKPOINT_FILE, self.plan.out / _LOG_FILE
        if not self.plan.is_resumed:
            held = next((path for path in (log, self.plan.out / _DRAFT) if path.exists()), None)
            if held is not None:
                raise TrainError(f"{held}: exists already; go on with --resume, or give another --out")
            return
        if not checkpoint.exists():
            return
        saved = torch.load(checkpoint, weights_only=True)
        for name, value in self._settings.items():
            if saved["settings"].get(name) != value:
                raise TrainError(
                    f"{checkpoint}: was made with {name} {saved['settings'].get(name)}, this run has {value}; "
                    f"resume with the same, or give another --out"
                )
        self._learner.load_state(saved["learner"], self._stream)
        self._place, self._log_bytes = saved["place"], saved["log_bytes"]
        self.evaluations = [Evaluation(*values) for values in saved["evaluations"]]
        self.last_loss = saved["last_loss"]
        self.has_resumed = True

    def run(self, observe: Callable[[Now], None], is_stopped: Callable[[], bool] = lambda: False) -> bool:
        """Train to the end, or until told to stop; returns whether it came to the end.

        `observe` is called after every sample. Raises: TrainError where a reporter's package is missing.
        """
        plan, trainer = self.plan, self._learner.trainer
        reporter = build_reporter(plan.report_to, plan.out, self._settings)
        saved_s = time.monotonic()
        with open(plan.out / _LOG_FILE, "ab") as log:
            log.truncate(self._log_bytes)
            if not self.evaluations:
                self._evaluate(reporter)
            for sample in self._stream.since(self._place):
                self._learn(sample, log, reporter)
                observe(self._now())
                has_stopped = is_stopped()
                if has_stopped or time.monotonic() - saved_s >= plan.config.trainer.checkpoint_s:
                    self._save(log)
                    saved_s = time.monotonic()
                if has_stopped:
                    reporter.close()
                    return False
            self._place = len(self._stream)
            if self.evaluations[-1].step != trainer.num_steps:
                self._evaluate(reporter)
            self._save(log)
        reporter.close()
        self._write_draft()
        observe(self._now())
        return True

    def _learn(self, sample: Sample, log: BinaryIO, reporter: Reporter) -> None:
        """Add a sample and take the steps it pays for."""
        trainer = self._learner.trainer
        self._learner.add(sample, sample.ended_s)
        while (result := self._learner.step(sample.ended_s)) is not None:
            self._note(log, result)
            reporter.scalars(trainer.num_steps, {"loss": result.loss, "grad_norm": result.grad_norm})
            if trainer.num_steps - self.evaluations[-1].step >= self.plan.eval_steps:
                self._evaluate(reporter)
        self._place = sample.request + 1

    def _note(self, log: BinaryIO, result: StepResult) -> None:
        if not math.isnan(result.loss):
            self.last_loss = result.loss
        loss = result.loss if math.isfinite(result.loss) else None
        line = {"step": self._learner.trainer.num_steps, "loss": loss, "rows": result.num_rows}
        log.write(json.dumps(line | {"is_applied": result.is_applied}).encode() + b"\n")
        log.flush()

    def _evaluate(self, reporter: Reporter) -> None:
        """The accept walk of the averaged weights: what would be published."""
        draft = Draft(self._draft_config, self._learner.trainer.weights()).to(self.plan.config.trainer.device)
        num_committed = num_steps = 0
        for sample in self.survey.evaluation:
            steps = walk(draft, sample, self._embed_VD, self.plan.num_draft_steps)
            num_committed += sum(steps.num_committed)
            num_steps += len(steps)
        value = num_committed / num_steps if num_steps else None
        step = self._learner.trainer.num_steps
        self.evaluations.append(Evaluation(step, self._learner.num_tokens, value))
        if value is not None:
            reporter.scalars(step, {"accept_length": value})

    def _now(self) -> Now:
        return Now(
            place=self._place,
            num_places=len(self._stream),
            step=self._learner.trainer.num_steps,
            loss=self.last_loss,
            num_tokens=self._learner.num_tokens,
            evaluation=self.evaluations[-1] if self.evaluations else None,
        )

    def _save(self, log: BinaryIO) -> None:
        os.fsync(log.fileno())
        self._log_bytes = log.tell()
        state = {
            "settings": self._settings,
            "learner": self._learner.state(),
            "place": self._place,
            "log_bytes": self._log_bytes,
            "evaluations": [list(asdict(evaluation).values()) for evaluation in self.evaluations],
            "last_loss": self.last_loss,
        }
        temporary = self.plan.out / f".{_CHECKPOINT_FILE}"
        torch.save(state, temporary)
        sync_path(temporary)
        temporary.rename(self.plan.out / _CHECKPOINT_FILE)
        sync_path(self.plan.out)

    def _write_draft(self) -> None:
        """The draft, whole or not at all, then the report, which names its digest."""
        out = self.plan.out
        temporary, final, earlier = out / f".{_DRAFT}", out / _DRAFT, out / f".{_DRAFT}-earlier"
        shutil.rmtree(earlier, ignore_errors=True)
        write_draft(temporary, self._draft_config, self._learner.trainer.weights())
        sync_tree(temporary)
        if final.exists():
            final.rename(earlier)
        temporary.rename(final)
        sync_path(out)
        shutil.rmtree(earlier, ignore_errors=True)
        report = out / f".{_REPORT_FILE}"
        report.write_text(json.dumps(self._report(digest(final)), indent=2) + "\n")
        report.rename(out / _REPORT_FILE)

    def _report(self, draft_digest: str) -> dict[str, Any]:
        plan, manifest, found = self.plan, self.recording.manifest, self.survey
        losses = [json.loads(line)["loss"] for line in (plan.out / _LOG_FILE).read_text().splitlines()]
        return {
            "command": list(plan.command),
            "onlinespec": onlinespec.__version__,
            "torch": torch.__version__,
            "config": msgspec.to_builtins(plan.config),
            "seed": plan.config.trainer.seed,
            "epochs": plan.epochs,
            "target": {"path": str(plan.target), "digest": manifest.facts.target_digest},
            "started_from": {"draft": plan.draft, "digest": self._settings["--draft"]},
            "recording": {
                "path": str(plan.recording),
                "digest": self.recording.digest,
                "sources": list(manifest.sources),
                "tenants": list(manifest.tenants),
                "samples": manifest.num_samples,
                "training_samples": found.num_training,
                "training_answer_tokens": found.num_training_tokens,
            },
            "evaluation": {
                "samples": len(found.evaluation),
                "dropped_as_repeats": found.num_repeats,
                "dropped_as_incomplete": found.num_incomplete,
                "draft_steps": plan.num_draft_steps,
                "accept_lengths": [asdict(evaluation) for evaluation in self.evaluations],
            },
            "steps": self._learner.trainer.num_steps,
            "skipped_steps": self._learner.trainer.num_skipped,
            "answer_tokens": self._learner.num_tokens,
            "losses": losses,
            "draft": {"path": str(plan.out / _DRAFT), "digest": draft_digest},
        }
