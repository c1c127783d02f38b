"""What a running draft loses when its loss is changed, with the ramp and without.

Recorded code traffic. A draft learns hard labels for the first half of a stream, is saved, and goes on with another
loss as a restarted sidecar would: `trainer.accept_ramp_steps` as by default, or 0. The rows count as sampled at
temperature 1, so that KL is the plain one. Accept length (greedy, held-out requests) before the change, the lowest
after it, and at the end; `same` goes on with hard labels.

Run: python benchmarks/bench_loss_change.py STREAMS OUT.json [--seeds 3]
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from bench_learning import FIRST_SEED, HELD_OUT_SEED, NUM_HELD_OUT, Stream, interval
from provenance import provenance
from record_streams import read_stream

from onlinespec.world.corpus import FIRST_DOMAIN

HALF_TOKENS = 8_000
CHANGES = {
    "same": ["trainer.loss=hard"],
    "kl": ["trainer.loss=kl"],
    "reverse kl": ["trainer.loss=reverse_kl"],
    "accept": ["trainer.accept_frac=1"],
}
RAMPS = {"ramp": [], "at once": ["trainer.accept_ramp_steps=0"]}


def run_seed(seed, streams):
    samples = [replace(sample, temperature=1.0) for sample in read_stream(streams, FIRST_DOMAIN, FIRST_SEED + seed)]
    answers = {sample.answer_key for sample in samples}
    held_out = read_stream(streams, FIRST_DOMAIN, HELD_OUT_SEED)[:NUM_HELD_OUT]
    held_out = {FIRST_DOMAIN: [sample for sample in held_out if sample.answer_key not in answers]}
    first = Stream(["trainer.loss=hard"], seed, held_out)
    first.play(FIRST_DOMAIN, samples[: len(samples) // 2], HALF_TOKENS)
    before, state = first.accept_length(FIRST_DOMAIN), first.learner.state()
    rows_of = {sample.request: sample for sample in samples}
    for change, overrides in CHANGES.items():
        for ramp, more in RAMPS.items():
            if change == "same" and ramp != "ramp":
                continue
            second = Stream([*overrides, *more], seed, held_out)
            second.learner.load_state(state, rows_of)
            curve = second.play(FIRST_DOMAIN, samples[len(samples) // 2 :], HALF_TOKENS)[1:]
            lowest, end = min(length for _, length in curve), curve[-1][1]
            yield {"seed": seed, "to": change, "how": ramp, "before": before, "lowest": lowest, "end": end}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("streams", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(options.seeds):
        for row in run_seed(seed, options.streams):
            rows.append(row)
            print(json.dumps(row), flush=True)
    table = []
    for to, how in dict.fromkeys((row["to"], row["how"]) for row in rows):
        found = [row for row in rows if (row["to"], row["how"]) == (to, how)]
        figures = {name: interval([row[name] for row in found]) for name in ("before", "lowest", "end")}
        worst = interval([row["before"] - row["lowest"] for row in found])
        table.append({"to": to, "how": how, **figures, "lost_at_worst": worst})
        print(json.dumps(table[-1]))
    options.out.write_text(json.dumps({**provenance(), "summary": table, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
