"""Print what the guard and the canary cost and find: requests to roll harm back, false rollbacks, pairs to a verdict.

Simulated accept lengths at depth 3, seeds fixed, default config. Delays count from the first harmed request, after a
long health.
Run: .venv/bin/python benchmarks/guard_delay.py [OUT.json]
"""

import json
import math
import sys
from collections import Counter

import numpy as np
from provenance import provenance

from onlinespec.config import CanaryConfig, GuardConfig
from onlinespec.gate.canary import Block, Canary
from onlinespec.gate.guard import Detector

ROWS = []
DEPTH = 3
GUARD = GuardConfig()
CANARY = CanaryConfig()
THRESHOLD = 2.0 * GUARD.false_alarm_requests


def record(question, **row):
    """Print a row and keep it for the JSON."""
    ROWS.append({"question": question, **row})
    print(question, " ".join(f"{name}={value}" for name, value in row.items()), flush=True)


def detector(name):
    tolerance = {"clean": GUARD.clean_tolerance_tokens, "aged": GUARD.aged_tolerance_tokens}
    if name == "quality":
        return Detector(GUARD.tolerance_tokens, GUARD.gain_clip_tokens)
    return Detector(tolerance[name], GUARD.excess_clip_tokens)


def first_alarm(watched, differences, threshold=THRESHOLD):
    """Requests until the alarm; None where there is none."""
    for number, difference in enumerate(differences.tolist(), start=1):
        watched.observe(difference)
        if watched.evidence >= threshold:
            return number
    return None


def delays(name, harm, spread, health=(0.0, 5000), num_seeds=50, most=5000):
    """Median, 90th percentile and most requests from harm to alarm. harm, spread: of the differences, in tokens."""
    found = []
    for seed in range(num_seeds):
        random, watched = np.random.default_rng(seed), detector(name)
        assert first_alarm(watched, random.normal(health[0], spread, health[1])) is None, "a false alarm"
        found.append(first_alarm(watched, random.normal(-harm, spread, most)) or math.inf)
    quantiles = np.quantile(found, [0.5, 0.9, 1.0], method="higher")
    median, ninth, longest = (float(value) if np.isfinite(value) else None for value in quantiles)
    record(
        f"delay, {name}", loss_tokens=harm, sd=spread, median_requests=median, p90_requests=ninth, max_requests=longest
    )


def find_harm():
    print("requests from harm to rollback, 50 seeds, thousands of healthy requests before")
    for harm in (1.5, 0.8, 0.3, 0.2):
        delays("clean", harm, 0.05)
    for harm in (1.5, 0.8, 0.5):
        delays("aged", harm, 0.15, health=(-0.1, 5000))
    for spread in (0.22, 0.33):
        for harm in (1.0, 0.5, 0.3, 0.2, 0.15):
            delays("quality", harm, spread, health=(0.1, 2000))


def damaged_in_memory():
    print(
        "live falls to 1.0, the shadow says 2.5 (sd 0.4 between requests): requests to rollback by false_alarm_requests"
    )
    for name in ("clean", "aged"):
        for false_alarm_requests in (10**5, 10**6, 10**7, 10**8):
            found = []
            for seed in range(200):
                shadow = np.random.default_rng(seed).normal(2.5, 0.4, 200).clip(1.0, 4.0)
                found.append(first_alarm(detector(name), 1.0 - shadow, 2.0 * false_alarm_requests))
            row = {"median_requests": float(np.median(found)), "max_requests": max(found)}
            record(f"damaged in memory, {name}", false_alarm_requests=false_alarm_requests, **row)


def health():
    print("healthy: false alarms at the default bound, in so many requests")
    for name, mean, spread in (
        ("clean", 0.0, 0.05),
        ("aged", -0.1, 0.15),
        ("quality", 0.0, 0.33),
        ("quality", 0.0, 0.6),
    ):
        num_seeds, num_requests, alarms = 20, 50_000, 0
        for seed in range(num_seeds):
            stream = np.random.default_rng(seed).normal(mean, spread, num_requests).clip(-DEPTH, DEPTH)
            alarms += first_alarm(detector(name), stream) is not None
        row = {"mean_tokens": mean, "sd": spread, "requests": num_seeds * num_requests, "alarms": alarms}
        record(f"health, {name}", **row)


def edge():
    """A two-point difference with a mean of exactly -tolerance, no gain clipped: H0 at its edge."""
    print("at the very edge of harm: share of lives of n requests with an alarm, against n / false_alarm_requests / 2")
    for ratio in (0.05, 0.25):
        num_lives, num_requests = 2000, 1000
        threshold = num_requests / ratio
        alarms = 0
        for seed in range(num_lives):
            values = np.random.default_rng(seed).choice([-0.4, 0.2], num_requests)
            alarms += first_alarm(detector("quality"), values, threshold) is not None
        record("edge of harm", bound=ratio, share=alarms / num_lives, lives=num_lives)


def traffic_turns():
    print("traffic turns from 2.5 to 1.4 accept length, draft and parent alike: alarms in 200 runs of 2,000 requests")
    alarms = Counter()
    for seed in range(200):
        random = np.random.default_rng(seed)
        parent = np.concatenate([random.normal(2.5, 0.4, 500), random.normal(1.4, 0.3, 1500)]).clip(1.0, 4.0)
        shadow = (parent + random.normal(0.0, 0.3, 2000)).clip(1.0, 4.0)
        live = shadow + random.normal(0.0, 0.05, 2000)
        alarms["quality"] += first_alarm(detector("quality"), shadow - parent) is not None
        alarms["clean"] += first_alarm(detector("clean"), live - shadow) is not None
    record("traffic turns", quality=alarms["quality"], clean=alarms["clean"], runs=200)


def canary_of(seed, effect, cost, running):
    """One canary: binomial acceptance at a mean of 2.2, step times with a spread of 10 %."""
    random, canary = np.random.default_rng(seed), Canary(CANARY, 2, 1, DEPTH, started_s=0.0)
    steps = CANARY.block_steps - 1
    for pair in range(CANARY.max_pairs):
        for version in (2, 1) if random.random() < 0.5 else (1, 2):
            share = (1.2 + effect * (version == 2)) / DEPTH
            tokens = steps * running + int(random.binomial(steps * running * DEPTH, min(max(share, 0.0), 1.0)))
            wall_s = steps * 0.01 * math.exp(random.normal(0.0, 0.1)) * (cost if version == 2 else 1.0)
            verdict = canary.observe(
                Block(pair, version, DEPTH, steps, tokens, steps * running, wall_s, float(running)), now_s=0.0
            )
            if verdict is not None:
                return verdict
    raise AssertionError("a canary ends at max_pairs")


def canaries():
    print(f"canaries, default config, blocks of {CANARY.block_steps} decode steps: outcomes of 100, pairs to a verdict")
    for effect, cost, running in (
        (-1.0, 1.0, 1),
        (-0.5, 1.0, 1),
        (-0.2, 1.0, 1),
        (-0.1, 1.0, 1),
        (0.0, 1.0, 1),
        (0.0, 1.0, 16),
        (0.1, 1.0, 1),
        (0.3, 1.0, 1),
        (0.3, 1.1, 1),
        (0.3, 1.3, 1),
    ):
        verdicts = [canary_of(seed, effect, cost, running) for seed in range(100)]
        outcomes = dict(Counter(verdict.outcome for verdict in verdicts))
        pairs = float(np.median([verdict.num_pairs for verdict in verdicts]))
        record("canary", effect=effect, cost=cost, running=running, median_pairs=pairs, outcomes=outcomes)


if __name__ == "__main__":
    damaged_in_memory()
    find_harm()
    health()
    edge()
    traffic_turns()
    canaries()
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            json.dump({**provenance(), "numpy": np.__version__, "rows": ROWS}, file, indent=1)
