"""Per-request accept lengths of drafts that a gate might compare, from recorded rows: what bench_gate.py resamples.

Two seeds of one recipe learn the same two streams of code, and each is also looked at 40 steps before the end: one
candidate's worth of training. All are walked over requests none of them has learned from, answers that occur in
training left out. Held-out code is three streams and the held-out one; support, which none has learned, is another
slice.

Source of the rows: `benchmarks/record_streams.py`.
"""

import json
from pathlib import Path

import torch
from bench_learning import HELD_OUT_SEED, NUM_DRAFT_STEPS
from provenance import provenance
from record_streams import read_stream

from onlinespec.draft.fresh import build_fresh_draft, read_embedding
from onlinespec.draft.model import Draft
from onlinespec.draft.walk import accept_length, accept_walk, matches_each
from onlinespec.resolve import load_config
from onlinespec.trainer.learner import Learner
from onlinespec.world import WORLD
from onlinespec.world.corpus import FIRST_DOMAIN, SHIFT_DOMAIN

TRAINING_STREAMS = (101, 102)
JUDGED_STREAMS = {FIRST_DOMAIN: (103, 104, 105, HELD_OUT_SEED), SHIFT_DOMAIN: (HELD_OUT_SEED,)}
SEEDS = (0, 1)
STEPS_APART = 40


def learn(seed, samples, embed_VD):
    """{name: draft}: of this seed, at the end and STEPS_APART before it."""
    config = load_config([], [f"trainer.seed={seed}"])
    draft_config, weights = build_fresh_draft(WORLD, seed)
    learner = Learner(config, draft_config, weights, embed_VD)
    looks = []
    for sample in samples:
        learner.add(sample, sample.ended_s)
        while learner.is_due:
            learner.step(sample.ended_s)
            if learner.trainer.num_steps % STEPS_APART == 0:
                looks = [*looks, learner.trainer.weights()][-2:]
    names = (f"seed {seed}, {STEPS_APART} steps earlier", f"seed {seed}")
    return {name: Draft(draft_config, look) for name, look in zip(names, looks, strict=True)}


def judge(drafts, samples, embed_VD):
    """Rows of {name: accept length}; a request without a verify step has none."""
    rows = []
    for sample in samples:
        found = matches_each(list(drafts.values()), sample, embed_VD, NUM_DRAFT_STEPS)
        walks = [accept_walk(each, sample.num_prompt_tokens, sample.num_tokens - 1, NUM_DRAFT_STEPS) for each in found]
        if all(len(walk) for walk in walks):
            lengths = [round(accept_length(walk), 5) for walk in walks]
            rows.append({"answer_tokens": sample.num_answer_tokens, **dict(zip(drafts, lengths, strict=True))})
    return rows


def record(streams: Path, out: Path) -> None:
    torch.set_num_threads(1)
    embed_VD = read_embedding(WORLD).float()
    training = [sample for seed in TRAINING_STREAMS for sample in read_stream(streams, FIRST_DOMAIN, seed)]
    answers = {sample.answer_key for sample in training}
    drafts = {}
    for seed in SEEDS:
        drafts |= learn(seed, training, embed_VD)
    report = {**provenance(), "draft_steps": NUM_DRAFT_STEPS, "training_requests": len(training), "requests": {}}
    for domain, seeds in JUDGED_STREAMS.items():
        found = [sample for seed in seeds for sample in read_stream(streams, domain, seed)]
        kept = list({sample.answer_key: sample for sample in found if sample.answer_key not in answers}.values())
        report["requests"][domain] = judge(drafts, kept, embed_VD)
        report[f"left_out_{domain}"] = len(found) - len(kept)
    out.write_text(json.dumps(report) + "\n")
