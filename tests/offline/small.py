"""A small target, recordings of noise made for it, and trainings that take a second."""

from dataclasses import replace
from pathlib import Path

import torch

from onlinespec.config import BufferConfig, Config, TrainerConfig
from onlinespec.draft.header import target_digest
from onlinespec.draft.sample import Sample
from onlinespec.offline.train import Now, Training, TrainPlan
from onlinespec.record.manifest import RowFacts
from onlinespec.record.recorder import Recorder
from tests.draft.tiny import build_sample, write_target

CONFIG = Config(
    buffer=BufferConfig(recent_samples=6, reservoir_samples=8, max_sequence_tokens=14),
    trainer=TrainerConfig(unroll_steps=2, checkpoint_s=1000.0, seed=3),
)


def build_samples(count: int) -> list[Sample]:
    """Conversations in which the next token is a function of the last: something to learn. Two share a group."""
    samples = []
    for number in range(count):
        sample = build_sample(number, num_prompt=4 + number % 3, num_answer=8 + number % 5)
        tokens_T = (torch.arange(sample.num_tokens) * 3 + number) % 29
        teacher_ids_Tk = (tokens_T[:, None] + 3 + torch.arange(4)) % 29
        sample = replace(sample, tokens_T=tokens_T, teacher_ids_Tk=teacher_ids_Tk)
        samples.append(replace(sample, group=bytes([number // 2] * 16), ended_s=10.0 * number))
    return samples


def write_recording(path: Path, target: Path, samples: list[Sample], **facts) -> Path:
    known = {"target_digest": target_digest(target), "hidden_size": 16, "aux_layers": (2, 4, 5), "teacher_top_k": 4}
    recorder = Recorder(path, RowFacts(**(known | facts)), "server", shard_bytes=20_000, max_bytes=10**8, created_s=1.0)
    for sample in samples:
        assert recorder.add(sample)
    recorder.close()
    return path


def build_plan(tmp_path: Path, num_samples: int = 30, **changes) -> TrainPlan:
    target, recording = tmp_path / "target", tmp_path / "recording"
    if not target.exists():
        write_target(target)
        write_recording(recording, target, build_samples(num_samples))
    plan = TrainPlan(recording, target, "init", tmp_path / "out", CONFIG, eval_frac=0.2, eval_steps=10)
    return replace(plan, **changes)


def run(plan: TrainPlan) -> tuple[Training, list[Now]]:
    seen: list[Now] = []
    training = Training(plan)
    assert training.run(seen.append)
    return training, seen
