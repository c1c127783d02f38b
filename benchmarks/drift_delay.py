"""Print what drift detection costs and brings: false alarms on steady traffic, verify steps until a fall is seen.

Simulated acceptance, seeds fixed. spread: standard deviation between requests of the acceptance of one cluster; 0 is
independent coins. A test is one cluster at one draft position.
Run: .venv/bin/python benchmarks/drift_delay.py [OUT.json]
"""

import json
import sys

import numpy as np
from provenance import provenance

from onlinespec.config import DriftConfig
from onlinespec.draft.sample import VerifySteps
from onlinespec.trainer.drift import Acceptance, Drift

ROWS = []
STEPS_EACH = 20
NUM_SEEDS = 200
SPREADS = (0.0, 0.1, 0.15)


def record(question, **row):
    """Print a row and keep it for the JSON."""
    ROWS.append({"question": question, **row})
    print(question, " ".join(f"{name}={value}" for name, value in row.items()), flush=True)


def acceptance_of(random, num_requests, mean, spread):
    """Each request's own acceptance: a beta distribution with that mean and standard deviation."""
    if not spread:
        return np.full(num_requests, mean)
    strength = mean * (1 - mean) / spread**2 - 1
    return random.beta(mean * strength, (1 - mean) * strength, num_requests)


def counts(random, num_steps, mean, spread):
    """Accepted tokens of each request of STEPS_EACH steps, at one position."""
    return random.binomial(STEPS_EACH, acceptance_of(random, num_steps // STEPS_EACH, mean, spread)).tolist()


def first_alarm(config, stream):
    """Verify steps until the alarm; None where there is none."""
    test = Acceptance()
    for number, correct in enumerate(stream, start=1):
        if test.observe(correct, STEPS_EACH, config):
            return number * STEPS_EACH
    return None


def one_test():
    print(f"one test, p = 0.7, {NUM_SEEDS} seeds: alarms in 20,000 steady steps; steps to see a fall after 4,000")
    for spread in SPREADS:
        for slack, threshold in ((0.03, 25.0), (0.05, 15.0), (0.05, 20.0), (0.05, 25.0)):
            config = DriftConfig(slack_frac=slack, threshold=threshold)
            steady = [
                first_alarm(config, counts(np.random.default_rng(seed), 20_000, 0.7, spread))
                for seed in range(NUM_SEEDS)
            ]
            row = {"spread": spread, "slack_frac": slack, "threshold": threshold}
            row["alarmed_share"] = sum(alarm is not None for alarm in steady) / NUM_SEEDS
            for after in (0.5, 0.6):
                delays = []
                for seed in range(NUM_SEEDS):
                    random = np.random.default_rng(1000 + seed)
                    stream = counts(random, 4000, 0.7, spread) + counts(random, 10_000, after, spread)
                    alarm = first_alarm(config, stream)
                    if alarm is None or alarm > 4000:
                        delays.append(np.inf if alarm is None else alarm - 4000)
                found = np.quantile(delays, [0.5, 0.9], method="higher")
                row[f"steps_to_{after}"] = [float(q) if np.isfinite(q) else None for q in found]
                row[f"missed_to_{after}"] = round(float(np.mean(np.isinf(delays))), 3)
            record("one test", **row)


def request(random, mean, spread, depth, version):
    """Verify steps of one request: each drafted token is accepted until the first miss."""
    accept = acceptance_of(random, 1, mean, spread)[0]
    misses = random.geometric(max(1 - accept, 1e-9), STEPS_EACH) - 1
    correct = np.minimum(misses, depth).tolist()
    return VerifySteps(
        start=[0] * STEPS_EACH,
        num_drafted=[depth] * STEPS_EACH,
        num_correct=correct,
        num_committed=[count + 1 for count in correct],
        version=[version] * STEPS_EACH,
        is_mixed=[False] * STEPS_EACH,
    )


def play(seed, phases):
    """Events of each phase (num_requests, {cluster: acceptance}, shares, depth, version), default config."""
    random, drift, found = np.random.default_rng(seed), Drift(DriftConfig()), []
    for num_requests, accept, shares, depth, version, spread in phases:
        clusters, events = list(accept), []
        for cluster in random.choice(clusters, num_requests, p=shares):
            verify = request(random, accept[int(cluster)], spread, depth, version)
            events += [event.kind for event in drift.observe(int(cluster), verify, version)]
        found.append(events)
    return found


def whole_detector(num_seeds=50):
    print(f"whole detector, 4 clusters x 3 positions, default config, {num_seeds} seeds: runs with events, by kind")
    four = {0: 0.8, 1: 0.7, 2: 0.6, 3: 0.5}
    even = [0.25] * 4
    lower = four | {1: 0.5}
    for spread in SPREADS:
        steady = (1000, four, even, 3, 1, spread)
        questions = {
            "20,000 steady steps": [steady],
            "mix turned to the hardest cluster": [steady, (500, four, [0.05, 0.05, 0.05, 0.85], 3, 1, spread)],
            "depth 3 to 1": [steady, (500, four, even, 1, 1, spread)],
            "depth 1 to 5": [(1000, four, even, 1, 1, spread), (500, four, even, 5, 1, spread)],
            "swap to an equal draft": [steady, (500, four, even, 3, 2, spread)],
            "one cluster falls 0.7 to 0.5": [steady, (500, lower, even, 3, 1, spread)],
            "swap to a draft worse on one cluster": [steady, (500, lower, even, 3, 2, spread)],
            "a cluster never seen, 0.4": [steady, (500, four | {4: 0.4}, [0.2] * 5, 3, 1, spread)],
        }
        for question, phases in questions.items():
            events = [play(seed, phases)[-1] for seed in range(num_seeds)]
            kinds = ("traffic", "draft", "new_traffic", "mix")
            shares = {kind: sum(kind in found for found in events) / num_seeds for kind in kinds}
            record(question, spread=spread, **shares)


if __name__ == "__main__":
    one_test()
    whole_detector()
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            json.dump({**provenance(), "numpy": np.__version__, "rows": ROWS}, file, indent=1)
