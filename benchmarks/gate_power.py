"""Print what the gate costs: median requests to promote, promoted share, false promotions at the null.

Gaussian differences with the spread that a first look at real ones measured; seeds fixed.
Run: .venv/bin/python benchmarks/gate_power.py [OUT.json]
"""

import json
import sys

import numpy as np
from provenance import provenance

from onlinespec.config import GateConfig
from onlinespec.gate.budget import candidate_alpha
from onlinespec.gate.eprocess import EProcess
from onlinespec.gate.race import Race

ROWS = []


def record(question, **row):
    """Print a row and keep it for the JSON."""
    ROWS.append({"question": question, **row})
    print(question, " ".join(f"{name}={value}" for name, value in row.items()))


def first_rejection(differences, num_draft_steps, alpha, min_gain=0.02):
    evidence = EProcess(float(num_draft_steps), min_gain)
    for number, difference in enumerate(differences, start=1):
        evidence.observe(difference)
        if evidence.has_rejected(alpha):
            return number
    return None


def summary(found):
    """Promoted share and the median over all streams, the unpromoted counted as infinite."""
    share = sum(number is not None for number in found) / len(found)
    median = np.median([np.inf if number is None else number for number in found])
    return {"promoted_share": round(share, 4), "median_requests": float(median) if np.isfinite(median) else None}


def open_ended():
    print("open-ended e-process: promoted share, median requests (streams of 1,000)")
    for steps, spread in ((3, 0.22), (5, 0.33)):
        for alpha in (0.05, 0.05 / 6):
            for gain, num_streams in (
                (0.0, 2000),
                (0.02, 2000),
                (0.05, 300),
                (0.1, 300),
                (0.2, 300),
                (0.5, 300),
                (1.0, 300),
            ):
                values = np.random.default_rng(7).normal(gain, spread, (num_streams, 1000)).clip(-steps, steps)
                found = [first_rejection(stream, steps, alpha) for stream in values.tolist()]
                record("open-ended", steps=steps, sd=spread, alpha=round(alpha, 4), gain=gain, **summary(found))


def race_of(gains, steps, alpha):
    config = GateConfig()
    race = Race("c", "i", steps, alpha, config, frozen_at_s=0.0)
    for number, gain in enumerate(gains):
        group = b"%d" % number
        race.admits(1.0, group, ())
        verdict = race.observe(number, 2000, 1000, round(1000 * (2.0 + gain)), 1000, group, now_s=0.0)
        if verdict is not None:
            return verdict
    raise AssertionError("a race ends at max_requests")


def whole_races():
    print("whole races, default GateConfig (futility 24, max 400): promoted share, median requests to promote")
    for alpha in (0.05, 0.05 / 6):
        for gain in (0.0, 0.05, 0.1, 0.2, 0.5, 1.0):
            random = np.random.default_rng(8)
            verdicts = [race_of(random.normal(gain, 0.22, 400).clip(-0.99, 3), 3, alpha) for _ in range(500)]
            lengths = [v.num_requests for v in verdicts if v.decision == "promote"]
            share = len(lengths) / len(verdicts)
            median = float(np.median(lengths)) if lengths else None
            record("whole race", alpha=round(alpha, 4), gain=gain, promoted_share=share, median_requests=median)


def a_life():
    print("one life of 20 candidates under e-LOND (alpha 0.05), true gain of each: requests to its verdict")
    gains = [1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.3, 0.2, 0.2, 0.2, 0.0, 0.15, 0.15, 0.0, 0.1, 0.1, 0.0, 0.1, 0.0, 0.1]
    random, num_promotions = np.random.default_rng(9), 0
    for number, gain in enumerate(gains):
        alpha = candidate_alpha(0.05, number, num_promotions)
        verdict = race_of(random.normal(gain, 0.22, 400).clip(-0.99, 3), 3, alpha)
        num_promotions += verdict.decision == "promote"
        found = {"decision": verdict.decision, "requests": verdict.num_requests}
        record("life", candidate=number + 1, gain=gain, alpha=round(alpha, 4), **found)


def dependent_turns():
    print("null, conversations whose turns share a hidden gain (sd 0.2 between, 0.1 within), alpha 0.05, 400 turns")
    for turns in (1, 10, 50):
        random = np.random.default_rng(10)
        shared = np.repeat(random.normal(0.02, 0.2, (2000, 400 // turns + 1)), turns, axis=1)[:, :400]
        values = (shared + random.normal(0.0, 0.1, shared.shape)).clip(-3, 3)
        found = [first_rejection(stream, 3, 0.05) for stream in values.tolist()]
        every = sum(number is not None for number in found) / len(found)
        once = [first_rejection(stream[::turns], 3, 0.05) for stream in values.tolist()]
        first = sum(number is not None for number in once) / len(once)
        record("dependent turns", turns=turns, every_turn_counted=every, one_per_conversation=first)


if __name__ == "__main__":
    open_ended()
    whole_races()
    a_life()
    dependent_turns()
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            json.dump({**provenance(), "numpy": np.__version__, "rows": ROWS}, file, indent=1)
