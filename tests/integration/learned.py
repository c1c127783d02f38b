"""Drafts that learned the demo world's code, made in half a minute without a server: rows of a plain forward pass."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from onlinespec.config import TrainerConfig
from onlinespec.draft.config import DraftConfig
from onlinespec.draft.fresh import read_embedding
from onlinespec.draft.sample import Sample
from onlinespec.offline.rows import TargetRows
from onlinespec.trainer.step import Trainer
from onlinespec.world import WORLD
from onlinespec.world.corpus import live

NUM_CHATS = 160
_SEED = 77
"""of the chats; no test asks them"""


def code_rows(config: DraftConfig, target: Path = WORLD) -> list[Sample]:
    """Rows of reference answers, as the tap would have captured them for a draft of this shape."""
    rows = TargetRows(
        target, config, teacher_top_k=8, temperature=0.0, max_tokens=256, generate_tokens=None, tenant="test"
    )
    chats = itertools.islice(live("code", _SEED), NUM_CHATS)
    roles = [({"role": "user", "content": c.user}, {"role": "assistant", "content": c.answer}) for c in chats]
    return [sample for messages in roles for sample in rows.samples(messages)]


def train_drafts(
    config: DraftConfig, weights: dict[str, torch.Tensor], epochs: Sequence[int], trainer: TrainerConfig
) -> Iterator[dict[str, torch.Tensor]]:
    """Weights after so many epochs each, one trained on from the other."""
    samples = code_rows(config)
    learner = Trainer(trainer, config, weights, read_embedding(WORLD).float())
    for number in epochs:
        for _ in range(number):
            for start in range(0, len(samples), 4):
                assert learner.step(samples[start : start + 4]).is_applied
        yield learner.weights()
