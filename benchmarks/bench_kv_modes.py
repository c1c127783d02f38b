"""What training may change while draft KV in the server is kept: KV modes on the live server.

Chats with long shared beginnings (radix cache on), an unconditional swap every SWAP_STEPS optimizer steps, the
same stream for every arm, and users that wait while a step is due, so that no arm trains less because the machine
is busy. After a swap the cache still holds keys and values of older drafts. Measured, per arm and seed, from the
swap after which the mode's tensors stand still: live accept length over the first NEAR_STEPS verify steps of each
version and from FAR_STEPS on (some 10 s of serving), over the last quarter of the stream; live minus shadow (the
same draft walked over the same rows with its own keys and values) on requests without a swap inside; CPU seconds
of training. Fresh: an untrained draft on support. Warm: a draft trained on code, then support.

Run: python benchmarks/bench_kv_modes.py OUT.json [--seeds 3] [--tokens 10000]; one boot a seed, resumes at the
next seed where OUT.json holds some.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from live import Traffic, prefixed_prompts, serving, until
from provenance import provenance

from onlinespec.bench.client import Sampling
from onlinespec.demo.run import CONFIG, free_port
from onlinespec.draft.checkpoint import read_draft
from onlinespec.draft.fresh import read_embedding
from onlinespec.draft.model import Draft
from onlinespec.draft.walk import accept_length, walk
from onlinespec.resolve import load_config
from onlinespec.trainer.assemble import Assembler
from onlinespec.trainer.learner import Learner
from onlinespec.trainer.prefix import PrefixRows
from onlinespec.wire.messages import RequestEnded, RequestStarted, Rows
from onlinespec.wire.sockets import SampleReceiver
from onlinespec.world import WORLD

ARMS = {
    "fresh": {
        "free": ["trainer.kv_mode=free"],
        "projections after 80 steps": ["trainer.kv_mode=projections", "trainer.kv_free_steps=80"],
        "stable after 80 steps": ["trainer.kv_mode=stable", "trainer.kv_free_steps=80"],
    },
    "warm": {
        "free": ["trainer.kv_mode=free"],
        "projections": ["trainer.kv_mode=projections"],
        "stable": ["trainer.kv_mode=stable"],
    },
}
SWAP_STEPS = 40
NEAR_STEPS = 60
FAR_STEPS = 250
WARM_STEPS = 200
NUM_USERS = 4
NUM_PREFIXES = 4
NUM_TURNS = 3
NUM_DRAFT_STEPS = 3


class Arm:
    """One stream through one way of training."""

    def __init__(self, server, overrides, weights, embed_VD, is_fresh):
        config = load_config([CONFIG], overrides)
        draft_config, _ = read_draft(server.paths.version(1))
        self.learner = Learner(config, draft_config, weights, embed_VD, is_fresh=is_fresh)
        self.server, self.embed_VD, self.draft_config = server, embed_VD, draft_config
        self.assembler = Assembler(PrefixRows(2**26), 600, 2**30)
        self.steps, self.requests, self.drafts, self.cpu_s, self.num_tokens = [], [], {}, 0.0, 0
        self.free_steps = config.trainer.kv_free_steps if is_fresh else 0
        self._publish(weights)
        self.first_settled = max(self.drafts)
        """versions up to this one may still have other keys and values"""

    def _publish(self, weights):
        version = self.server.swap(weights)
        self.drafts[version] = Draft(self.draft_config, weights)

    def take(self, receiver, timeout_s):
        """One message."""
        received = receiver.receive(timeout_s)
        if received is None:
            return False
        message, frames = received
        if isinstance(message, RequestStarted):
            self.assembler.start(message)
        elif isinstance(message, Rows):
            for segment in message.segments:
                if segment.is_verify:
                    self.steps.append((segment.version, segment.is_mixed, len(segment.tokens)))
                    self.num_tokens += len(segment.tokens)
            self.assembler.rows(message, frames)
        elif isinstance(message, RequestEnded):
            sample = self.assembler.end(message)
            if sample is not None:
                self.requests.append(sample)
                self.learner.add(sample, time.time())
        return True

    def train(self):
        began_s = time.thread_time()
        self.learner.step(time.time())
        self.cpu_s += time.thread_time() - began_s
        trainer = self.learner.trainer
        if trainer.num_steps % SWAP_STEPS == 0:
            self._publish(trainer.weights())
            if trainer.num_steps <= self.free_steps:
                self.first_settled = max(self.drafts)

    def play(self, receiver, domain, seed, num_tokens):
        """Serve, learn and swap until so many answer tokens have come."""
        make_prompts = partial(prefixed_prompts, domain, seed, NUM_PREFIXES, NUM_TURNS)
        traffic = Traffic(self.server.base_url, make_prompts, NUM_USERS, Sampling(max_tokens=160))
        traffic.start()
        while self.num_tokens < num_tokens:
            traffic.hold(self.learner.is_due)
            while self.take(receiver, 0.0 if self.learner.is_due else 0.02):
                pass
            if self.learner.is_due:
                self.train()
        answers = traffic.stop()
        until(lambda: not self.take(receiver, 0.5), 60)
        return answers

    def stale_loss(self):
        """Requests, and per request the accept length live and walked, complete ones under one settled version."""
        total = [0, 0.0, 0.0]
        for sample in self.requests:
            versions = set(sample.verify.version)
            if len(versions) != 1 or any(sample.verify.is_mixed) or not sample.is_complete:
                continue
            if min(versions) <= self.first_settled:
                continue
            walked = walk(self.drafts[versions.pop()], sample, self.embed_VD, NUM_DRAFT_STEPS)
            total[0] += 1
            total[1] += accept_length(sample.verify)
            total[2] += accept_length(walked)
        return total

    def window(self, first, last):
        """Accept length over the verify steps [first, last) of each settled version."""
        tokens = []
        for version in self.drafts:
            if version > self.first_settled:
                own = [count for number, is_mixed, count in self.steps if number == version and not is_mixed]
                tokens += own[first:last]
        return round(sum(tokens) / len(tokens), 3) if tokens else None

    def result(self):
        quarter = [tokens for _, _, tokens in self.steps[len(self.steps) * 3 // 4 :]]
        requests, live_length, shadow_length = self.stale_loss()
        return {
            "settled_versions": sum(version > self.first_settled for version in self.drafts),
            "answer_tokens": self.num_tokens,
            "accept_length_right_after_a_swap": self.window(0, NEAR_STEPS),
            "accept_length_10s_after_a_swap": self.window(FAR_STEPS, None),
            "accept_length_last_quarter": round(sum(quarter) / len(quarter), 3),
            "requests_under_one_version": requests,
            "live_minus_shadow": round((live_length - shadow_length) / max(1, requests), 4),
            "training_cpu_s": round(self.cpu_s, 1),
            "optimizer_steps": self.learner.trainer.num_steps,
        }


def run_arm(server, start, overrides, weights, embed_VD, seed, num_tokens):
    receiver = SampleReceiver(server.paths.samples_endpoint)
    until_s = time.monotonic() + 1.5
    while time.monotonic() < until_s:
        receiver.receive(0.1)  # what belongs to the arm before
    server.flush()
    arm = Arm(server, [*overrides, f"trainer.seed={seed}"], weights, embed_VD, is_fresh=start == "fresh")
    answers = arm.play(receiver, "support", seed, num_tokens)
    receiver.close()
    failed = [answer.error for answer in answers if answer.error]
    assert not failed, failed[:3]
    texts = [answer.text for answer in answers]
    prompt_tokens = statistics.mean(answer.num_prompt_tokens for answer in answers)
    return arm.result() | {"distinct_answers": len(set(texts)) / len(texts), "prompt_tokens": round(prompt_tokens)}


def warm_weights(server, embed_VD, seed):
    """A draft that has learned code, 8,000 answer tokens and more steps on those; its accept length on the last."""
    _, weights = read_draft(server.paths.version(1))
    arm = Arm(server, [f"trainer.seed={seed}"], weights, embed_VD, is_fresh=True)
    receiver = SampleReceiver(server.paths.samples_endpoint)
    arm.play(receiver, "code", seed, 8000)
    receiver.close()
    learner = arm.learner
    for _ in range(WARM_STEPS):
        learner.trainer.step(learner.buffer.draw(2, time.time()))
    draft, samples = Draft(arm.draft_config, learner.trainer.weights()), arm.requests[-16:]
    lengths = [accept_length(walk(draft, sample, embed_VD, NUM_DRAFT_STEPS)) for sample in samples]
    return learner.trainer.weights(), round(statistics.mean(lengths), 2)


def run_seed(seed, num_tokens, rows):
    embed_VD = read_embedding(WORLD).float()
    with serving(free_port()) as server:
        _, fresh = read_draft(server.paths.version(1))
        warm, warm_length = warm_weights(server, embed_VD, seed)
        print(f"seed {seed}: the warm draft has accept length {warm_length} on code it has seen", flush=True)
        for start, weights in (("fresh", fresh), ("warm", warm)):
            for mode, overrides in ARMS[start].items():
                row = run_arm(server, start, overrides, weights, embed_VD, seed, num_tokens)
                rows.append({"seed": seed, "start": start, "mode": mode, **row})
                print(json.dumps(rows[-1]), flush=True)


def summary(rows):
    """Mean over seeds by arm, with the smallest and largest."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["start"], row["mode"]].append(row)
    table = []
    for (start, mode), found in groups.items():
        line = {"start": start, "mode": mode, "seeds": len(found)}
        for key in found[0]:
            values = [row[key] for row in found if isinstance(row[key], int | float) and key != "seed"]
            if values:
                line[key] = [round(v, 3) for v in (statistics.mean(values), min(values), max(values))]
        table.append(line)
    return table


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for seed in range(1, options.seeds + 1):
        if seed in {row["seed"] for row in rows}:
            continue
        run_seed(seed, options.tokens, rows)
        report = {
            **provenance(),
            "swap_steps": SWAP_STEPS,
            "near": NEAR_STEPS,
            "far": FAR_STEPS,
            "summary": summary(rows),
            "rows": rows,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
