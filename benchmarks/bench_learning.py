"""How many tokens until the weights in training are good: this trainer against the usual online recipe, ungated.

What is in service, gate and swaps included, and more orders: `onlinespec bench stream --replay`. Here are the changes
to the trainer.

Rows of a real server (`benchmarks/record_streams.py`): code, then a shift to support. Both arms start from the
same untrained draft and see the same requests in the same order; accept length is the walk over held-out
requests of the phase's domain, every EVERY_TOKENS answer tokens, on the weights that would be published.
Held-out answers that occur in training are dropped.

Each phase is two recorded streams, so neighbouring seeds share text, in another order and with other weights.

Tokens to 90 %: first look from which on the accept length stays at least 0.9 of a final one (mean of the last four
looks): of the better arm's (`best`; an arm that never gets there counts the whole phase, a lower bound), of the
recipe's (`recipe`), of the arm's own (`own`). Return: accept length on code after the support phase, over that
before it.

Run: python benchmarks/bench_learning.py STREAMS OUT.json [--seeds 5] [--tokens 32000] [--arms "onlinespec;recipe"]
A run that was stopped goes on where OUT.json ends; every row names its commit. All seeds share the held-out requests.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import msgspec
import torch
from provenance import provenance
from record_streams import read_stream

from onlinespec.bench.arms import RECIPE
from onlinespec.bench.interval import mean_interval
from onlinespec.bench.replay import accept_length
from onlinespec.bench.replay_gate import Shape
from onlinespec.draft.fresh import build_fresh_draft, read_embedding
from onlinespec.draft.model import Draft
from onlinespec.resolve import load_config
from onlinespec.trainer.learner import Learner
from onlinespec.world import WORLD
from onlinespec.world.corpus import FIRST_DOMAIN, SHIFT_DOMAIN

EVERY_TOKENS = 1_000
NUM_DRAFT_STEPS = 3
NUM_HELD_OUT = 32
HELD_OUT_SEED = 201
FIRST_SEED = 101
NUM_STREAMS = 5
ARMS = {
    "onlinespec": [],
    "recipe": RECIPE,
    "recipe, as many steps": [*RECIPE, "trainer.batch_requests=2", "trainer.passes=2"],
    "recipe, lr 1e-3": [*RECIPE, "trainer.adamw_lr=0.001"],
    "recipe, lr 4e-3": [*RECIPE, "trainer.adamw_lr=0.004"],
    "onlinespec, accept 0.5": ["trainer.accept_frac=0.5", "trainer.accept_ramp_steps=100"],
    "onlinespec, reach weights": ["trainer.step_weights=reach"],
    "onlinespec, reverse kl": ["trainer.loss=reverse_kl"],
    "onlinespec, lora 16": ["trainer.lora_rank=16"],
    "onlinespec, projections": ["trainer.kv_mode=projections"],
    "onlinespec, stable": ["trainer.kv_mode=stable"],
    "onlinespec, float32": ["trainer.dtype=float32"],
    "onlinespec, bfloat16": ["trainer.dtype=bfloat16"],
}


class Stream:
    """One arm on one seed's stream."""

    def __init__(self, overrides, seed, held_out):
        self.config = load_config([], [*overrides, f"trainer.seed={seed}"])
        draft_config, weights = build_fresh_draft(WORLD, self.config.trainer.seed)
        self.shape = Shape(draft_config, read_embedding(WORLD).float(), NUM_DRAFT_STEPS)
        self.learner = Learner(self.config, draft_config, weights, self.shape.embed_VD)
        self.held_out, self.cpu_s = held_out, 0.0

    def accept_length(self, domain):
        draft = Draft(self.shape.draft_config, self.learner.trainer.weights())
        return accept_length(draft, self.held_out[domain], self.shape)

    def play(self, domain, samples, phase_tokens):
        """[(answer tokens seen in this phase, accept length)]."""
        curve, num_tokens = [(0, self.accept_length(domain))], 0
        for sample in samples:
            if num_tokens >= phase_tokens:
                break
            before, num_tokens = num_tokens, num_tokens + sample.num_answer_tokens
            began_s = time.thread_time()
            self.learner.add(sample, sample.ended_s)
            while self.learner.is_due:
                self.learner.step(sample.ended_s)
            self.cpu_s += time.thread_time() - began_s
            if before // EVERY_TOKENS != num_tokens // EVERY_TOKENS:
                curve.append((num_tokens, self.accept_length(domain)))
        return curve


def last(curve):
    """Mean of the last four looks."""
    return statistics.mean(length for _, length in curve[-4:])


def run(arm, seed, streams, phase_tokens):
    phases = (FIRST_DOMAIN, SHIFT_DOMAIN)
    seeds = (FIRST_SEED + seed % NUM_STREAMS, FIRST_SEED + (seed + 1) % NUM_STREAMS)
    train = {domain: [s for number in seeds for s in read_stream(streams, domain, number)] for domain in phases}
    answers = {sample.answer_key for samples in train.values() for sample in samples}
    held_out, num_dropped = {}, 0
    for domain in phases:
        found = read_stream(streams, domain, HELD_OUT_SEED)[:NUM_HELD_OUT]
        held_out[domain] = [sample for sample in found if sample.answer_key not in answers]
        num_dropped += len(found) - len(held_out[domain])
    stream = Stream(ARMS[arm], seed, held_out)
    first = stream.play(FIRST_DOMAIN, train[FIRST_DOMAIN], phase_tokens)
    left = stream.accept_length(FIRST_DOMAIN)
    second = stream.play(SHIFT_DOMAIN, train[SHIFT_DOMAIN], phase_tokens)
    return {
        "arm": arm,
        "seed": seed,
        "curves": [first, second],
        "final": [last(first), last(second)],
        "first_domain_when_left": left,
        "first_domain_at_return": stream.accept_length(FIRST_DOMAIN),
        "training_cpu_s": stream.cpu_s,
        "optimizer_steps": stream.learner.trainer.num_steps,
        "held_out": [len(found) for found in held_out.values()],
        "held_out_dropped": num_dropped,
        "commit": provenance()["commit"],
    }


def tokens_to(curve, wanted):
    """Answer tokens of the first look from which on every look is at least `wanted`; the last one's where none is."""
    for index, (tokens, _) in enumerate(curve):
        if all(length >= wanted for _, length in curve[index:]):
            return tokens
    return curve[-1][0]


def interval(values):
    """Mean and a t interval of 95 % over the seeds."""
    found = mean_interval(values)
    return [value if value is None else round(value, 3) for value in (found.mean, found.low, found.high)]


def is_whole(by, arm, seed):
    return all((name, seed) in by for name in (arm, "recipe", "onlinespec"))


def summary(rows):
    """By arm: tokens to 90 %, at the start and after the shift, final accept lengths, the return; and ratios."""
    by = {(row["arm"], row["seed"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    table = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        line = {"arm": arm}
        for phase, name in enumerate(("start", "shift")):
            runs = [
                (by[arm, seed], by["recipe", seed], by["onlinespec", seed]) for seed in seeds if is_whole(by, arm, seed)
            ]
            if not runs:
                continue
            line[f"{name}_final"] = interval([row["final"][phase] for row, _, _ in runs])
            for target, of in (("best", (1, 2)), ("recipe", (1,)), ("own", (0,))):
                wanted = [0.9 * max(run[i]["final"][phase] for i in of) for run in runs]
                found = [tokens_to(run[0]["curves"][phase], w) for run, w in zip(runs, wanted, strict=True)]
                line[f"{name}_to_{target}"] = interval(found)
                if target != "own":
                    theirs = [tokens_to(run[1]["curves"][phase], w) for run, w in zip(runs, wanted, strict=True)]
                    line[f"{name}_to_{target}_over_recipe"] = interval(
                        [a / b for a, b in zip(found, theirs, strict=True)]
                    )
        rows_of = [row for row in rows if row["arm"] == arm]
        line["return"] = interval([row["first_domain_at_return"] / row["first_domain_when_left"] for row in rows_of])
        line["training_cpu_s"] = interval([row["training_cpu_s"] for row in rows_of])
        table.append(line)
    return table


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("streams", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32_000, help="answer tokens of each phase")
    parser.add_argument("--arms", default="onlinespec;recipe", help="by name, with semicolons between")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for seed in range(options.seeds):
        for arm in options.arms.split(";"):
            if any((row["arm"], row["seed"]) == (arm, seed) for row in rows):
                continue
            rows.append(run(arm, seed, options.streams, options.tokens))
            final = [round(value, 2) for value in rows[-1]["final"]]
            print(arm, seed, final, round(rows[-1]["training_cpu_s"]), "CPU s", flush=True)
            settings = {"config": msgspec.to_builtins(load_config([], [])), "arms": ARMS}
            report = {**provenance(), **settings, "summary": summary(rows), "rows": rows}
            options.out.write_text(json.dumps(report) + "\n")
    for line in summary(rows):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
