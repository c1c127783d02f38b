"""From recordings to what a replay needs: requests by domain, held-out ones, a start, and oracles."""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import torch

from onlinespec.bench.replay import World, accept_length
from onlinespec.bench.replay_gate import Shape
from onlinespec.bench.replay_orders import tokens_per_s
from onlinespec.config import Config
from onlinespec.draft.checkpoint import read_draft, write_draft
from onlinespec.draft.config import DraftConfig
from onlinespec.draft.fresh import read_embedding
from onlinespec.draft.header import target_digest
from onlinespec.draft.model import Draft
from onlinespec.draft.sample import Sample
from onlinespec.draft.start import is_fresh, read_start
from onlinespec.errors import BenchError
from onlinespec.record.manifest import RowFacts, check_facts
from onlinespec.record.reader import Recording
from onlinespec.resolve import load_config
from onlinespec.trainer.learner import Learner

FIRST = "first"
"""the draft to start with is the oracle of the first domain: one that fits the traffic until it moves"""
NUM_HELD_OUT = 32
_MAX_MISSING_FRAC = 0.5
_NOTE_FILE = "made_from.json"
# Every request of the domain once a pass, no memory beside it: the schedule decays to the end of the last pass.
_ORACLE = (
    "trainer.passes=1",
    "trainer.new_task_requests=0",
    "trainer.batch_requests=4",
    "trainer.schedule=wsd",
    "trainer.kv_mode=free",
    "buffer.replay_frac=0",
    "buffer.reservoir_samples=0",
)


@dataclass(frozen=True)
class Pools:
    """Requests by domain, in the order in which the domains were given."""

    train: Mapping[str, Sequence[Sample]]
    held_out: Mapping[str, Sequence[Sample]]
    tokens_per_s: float
    """answer tokens, as recorded; mean over the recordings"""
    digests: dict[str, list[str]]
    """of the recordings, by domain"""


def domain_and_path(text: str) -> tuple[str, Path]:
    """`DOMAIN=DIRECTORY`, or a directory whose name, less a number at its end, is the domain: `code-101`."""
    name, separator, path = text.rpartition("=")
    return (name, Path(path)) if separator else (re.sub(r"-\d+$", "", Path(text).name), Path(text))


def read_pools(recordings: Sequence[str], target: Path) -> Pools:
    """Raises: BenchError where a domain has too few requests; RecordError where a recording does not fit."""
    found: dict[str, list[Sample]] = {}
    digests: dict[str, list[str]] = {}
    rates: list[float] = []
    facts: RowFacts | None = None
    for text in recordings:
        domain, path = domain_and_path(text)
        recording = Recording(path)
        facts = facts or msgspec.structs.replace(recording.manifest.facts, target_digest=target_digest(target))
        check_facts(path, recording.manifest.facts, facts, "give recordings of one target, and it as --target")
        samples = [sample for sample in recording if sample.missing_prompt_frac <= _MAX_MISSING_FRAC]
        found.setdefault(domain, []).extend(samples)
        digests.setdefault(domain, []).append(recording.digest)
        rates.append(tokens_per_s(samples))
    if len(found) < 2:
        raise BenchError(f"the recordings are all of {', '.join(found)}; a stream needs two domains, so give another's")
    held_out = {domain: choose_held_out(domain, samples) for domain, samples in found.items()}
    kept = {sample.answer_key for samples in held_out.values() for sample in samples}
    train = {domain: [s for s in samples if s.answer_key not in kept] for domain, samples in found.items()}
    return Pools(train, held_out, sum(rates) / len(rates), digests)


def choose_held_out(domain: str, samples: Sequence[Sample]) -> list[Sample]:
    """NUM_HELD_OUT requests with answers all different, by a hash of their tokens: the same whatever the seed.

    Raises: BenchError where there are too few to leave as many to train on.
    """
    whole = [sample for sample in samples if sample.num_answer_tokens > 1 and sample.is_complete]
    whole.sort(key=lambda sample: hashlib.sha256(sample.tokens_T.numpy().tobytes()).digest())
    distinct = {sample.answer_key: sample for sample in reversed(whole)}  # of equal answers the first by hash
    if len(distinct) < 2 * NUM_HELD_OUT:
        raise BenchError(
            f"the recordings of {domain} hold {len(distinct)} different whole answers, wanted {2 * NUM_HELD_OUT}: half "
            "of them to judge on; record more"
        )
    return list(reversed(distinct.values()))[:NUM_HELD_OUT]


Progress = Callable[[str, int, int], None]
"""told of an oracle's training: domain, steps done, steps in all"""


def _silent(domain: str, done: int, steps: int) -> None:
    pass


def build_world(
    pools: Pools,
    target: Path,
    draft: str,
    num_draft_steps: int,
    oracle_passes: int,
    cache: Path,
    on_step: Progress = _silent,
) -> World:
    """Train the oracles, or read them from the cache, and begin with the draft asked for: FIRST, or as `draft.start`.

    Raises: CheckpointError where the draft does not fit the target.
    """
    start = "init" if draft == FIRST else draft
    draft_config, weights = read_start(start, target, seed=0)
    shape = Shape(draft_config, read_embedding(target), num_draft_steps)
    oracles: dict[str, dict[str, torch.Tensor]] = {}
    for domain, samples in pools.train.items():
        made_from = {"recordings": pools.digests[domain], "passes": oracle_passes, "draft": start}
        if not _is_cached(cache / domain, made_from):
            learner = Learner(
                oracle_config(len(samples), oracle_passes), draft_config, weights, shape.embed_VD, is_fresh(start)
            )
            learn_all(learner, samples, oracle_passes, partial(on_step, domain))
            _keep(cache / domain, draft_config, learner.trainer.weights(), made_from)
        oracles[domain] = read_draft(cache / domain)[1]
    lengths = {
        domain: accept_length(Draft(draft_config, oracle), pools.held_out[domain], shape)
        for domain, oracle in oracles.items()
    }
    if draft == FIRST:
        weights = next(iter(oracles.values()))
    return World(shape, weights, is_fresh(draft), pools.held_out, lengths)


def oracle_config(num_samples: int, passes: int) -> Config:
    config = load_config([], _ORACLE)
    steps = max(1, num_samples * passes // config.trainer.batch_requests)
    return load_config([], [*_ORACLE, f"trainer.schedule_steps={steps}"])


def learn_all(learner: Learner, samples: Sequence[Sample], passes: int, on_step: Callable[[int, int], None]) -> None:
    """Every sample once a pass, in an order of its own; the clock of the buffer stands still."""
    rng = random.Random("oracle")
    for done in range(passes):
        for place, sample in enumerate(rng.sample(list(samples), len(samples))):
            learner.add(sample, sample.ended_s)
            while learner.step(sample.ended_s) is not None:
                on_step(done * len(samples) + place + 1, passes * len(samples))


def _is_cached(folder: Path, made_from: dict[str, object]) -> bool:
    note = folder / _NOTE_FILE
    return note.is_file() and json.loads(note.read_text()) == made_from


def _keep(folder: Path, config: DraftConfig, weights: dict[str, torch.Tensor], made_from: dict[str, object]) -> None:
    """Whole or not at all."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    write_draft(temporary, config, weights)
    (temporary / _NOTE_FILE).write_text(json.dumps(made_from))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
