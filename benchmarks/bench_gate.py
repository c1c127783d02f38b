"""Does the promotion gate keep its promise, and what does a promise cost in requests?

The gate's own e-processes, rules, budget and races, on per-request differences that real drafts had on real rows
(`benchmarks/gate_differences.py`): two seeds of one recipe, and a draft against itself one candidate earlier. They are
re-centred to the mean in question and drawn with replacement; every look after every request counts. Rows say what
was promised beside what was found, with a Wilson interval of 95 %.

Run: python benchmarks/bench_gate.py OUT.json [--differences FILE]; the plot is OUT.png. A few minutes on one core.
Record the differences anew: python benchmarks/bench_gate.py --record STREAMS OUT-differences.json
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
from gate_differences import SEEDS, STEPS_APART, record
from gate_plot import plot
from provenance import provenance

from onlinespec.config import GateConfig
from onlinespec.gate.budget import candidate_alpha
from onlinespec.gate.eprocess import build_test
from onlinespec.gate.race import Race, is_futile
from onlinespec.gate.slices import slice_labels
from onlinespec.gate.verdict import Walked

DIFFERENCES = Path(__file__).parent / "results" / "gate-differences.json"
TESTS = ("betting", "bernstein")
PARTS = ("false_promotions", "lives", "power", "slices", "replayed")
NUM_RACES = 10_000
NUM_LIVES, LIFE_CANDIDATES, CANDIDATE_S = 1_000, 200, 180.0
POWER_RACES, OPEN_REQUESTS = 2_000, 4_000
GAINS = (0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5)
CANDIDATES = (1, 20, 200)
SLICE_RACES, REPLAYED_RACES = 200, 100
WALK_STEPS = 10**6
BURST = 10


def wilson(count, total, z=1.96):
    share, spread = count / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * (share * (1 - share) / total + spread / total / 4) ** 0.5 / (1 + spread)
    return [round(max(middle - half, 0.0), 5), round(min(middle + half, 1.0), 5)]


def levels(config, num_candidates):
    """Level of each candidate of a life in which one comes every CANDIDATE_S, none helped by a pause."""
    races = []
    for number in range(num_candidates):
        races.append((number * CANDIDATE_S, candidate_alpha(number * CANDIDATE_S, races, config)))
    return [alpha for _, alpha in races]


def first_promotions(draw, num_races, num_requests, alphas, config, bound, has_rules=False):
    """Request of each race's promotion at each level, inf for none. draw(n) gives request n's gain of every race."""
    evidence = build_test(config.test, min(bound, config.gain_clip_tokens), config.min_gain_tokens)
    found = np.full((len(alphas), num_races), np.inf)
    is_dropped, total, squares = np.zeros(num_races, bool), 0.0, 0.0
    for number in range(1, num_requests + 1):
        gain = draw(number)
        evidence.observe(gain)
        for at, alpha in zip(found, alphas, strict=True):
            if number >= config.min_requests:
                at[np.isinf(at) & ~is_dropped & evidence.has_rejected(alpha)] = number
        if has_rules:
            total, squares = total + gain, squares + gain * gain
            is_dropped |= is_futile(number, total, squares, config)
    return found


def centred(pool, mean):
    return pool - pool.mean() + mean


def drawn(pool, num_races, seed):
    """draw(n): independent of all before."""
    random = np.random.default_rng(seed)
    return lambda number: pool[random.integers(len(pool), size=num_races)]


def nulls(pool, config, num_races):
    """{name: (is promised, draw)}: the mean given the past is never above min_gain, or just on average is not."""
    base = centred(pool, config.min_gain_tokens)

    def shifted(shift, seed):
        draw, random = drawn(base, num_races, seed), np.random.default_rng(seed + 100)
        phase, state = random.uniform(0, 200, num_races), {}
        return lambda number: draw(number) + shift(number, phase, random, state)

    def wave(number, phase, _random, _state, lift=0.0):
        return 0.1 * (np.sin(2 * np.pi * (number + phase) / 200) - 1.0 + lift)

    def of_burst(number, _phase, random, state, effect, size=BURST):
        if (number - 1) % size == 0:
            state["effect"] = effect(random)
        return state["effect"]

    def steps(number, phase, _random, _state):
        return np.where((number + phase) % 200 < 150, 0.0, -0.1)

    def spread(number, _phase, random, state):
        # Noise of its own on top, as wide as the burst's hidden luck says: the mean stays what it is.
        if (number - 1) % BURST == 0:
            state["width"] = random.choice([0.0, 0.4], num_races)
        return state["width"] * random.choice([-1.0, 1.0], num_races)

    def never_above(random):
        return random.choice([0.0, -0.2], num_races)

    def around(random):
        return random.normal(0.0, 0.2, num_races)

    return {
        "re-centred": (True, drawn(base, num_races, 1)),
        "drifting, never above": (True, shifted(wave, 2)),
        "at it three times in four, below else": (True, shifted(steps, 7)),
        "bursts of shared spread, at it": (True, shifted(spread, 8)),
        "bursts, never above": (True, shifted(partial(of_burst, effect=never_above), 3)),
        "drifting around it": (False, shifted(partial(wave, lift=1.0), 4)),
        "bursts around it, all counted": (False, shifted(partial(of_burst, effect=around), 5)),
        "bursts around it, one counted": (True, shifted(partial(of_burst, effect=around, size=1), 6)),
    }


def false_promotions(pools, bound, config):
    """Every null, both pools; no rule but the e-process and min_requests, which is the hardest case."""
    rows = []
    for name, pool in pools.items():
        for null, (is_promised, draw) in nulls(pool, config, NUM_RACES).items():
            found = first_promotions(draw, NUM_RACES, config.max_requests, [config.alpha], config, bound)
            count = int(np.isfinite(found).sum())
            rows.append(
                {
                    "test": config.test,
                    "differences": name,
                    "null": null,
                    "is_promised": is_promised,
                    "promised": config.alpha if is_promised else None,
                    "races": NUM_RACES,
                    "found": count / NUM_RACES,
                    "interval": wilson(count, NUM_RACES),
                }
            )
    return rows


def lives(pool, bound, config):
    """Lives of nothing but null candidates, each race at its level of the budget and without rules that drop it."""
    alphas = np.tile(levels(config, LIFE_CANDIDATES), NUM_LIVES)
    draw = drawn(centred(pool, config.min_gain_tokens), len(alphas), 7)
    found = np.isfinite(first_promotions(draw, len(alphas), config.max_requests, [alphas], config, bound)[0])
    by_life = found.reshape(NUM_LIVES, LIFE_CANDIDATES).sum(1)
    days = LIFE_CANDIDATES * CANDIDATE_S / 86_400
    per_race = wilson(int(found.sum()), len(found))
    return {
        "test": config.test,
        "lives": NUM_LIVES,
        "candidates": LIFE_CANDIDATES,
        "minutes_apart": CANDIDATE_S / 60,
        "promised_per_life": round(config.max_false_promotions_per_day * (days + 1), 4),
        "levels_spent_per_life": round(float(alphas[:LIFE_CANDIDATES].sum()), 4),
        "found_per_life": float(by_life.mean()),
        "interval": [round(end * LIFE_CANDIDATES, 4) for end in per_race],
        "lives_with_one_or_more": float((by_life > 0).mean()),
        "most_in_one_life": int(by_life.max()),
    }


def median(found):
    """Over all races, those without a promotion counted as infinite; None where that is the median."""
    value = float(np.median(found))
    return value if np.isfinite(value) else None


def power(pools, bound, config):
    """What a true gain asks, by the candidate's number: open-ended, and with the rules that drop."""
    alphas = [levels(config, CANDIDATES[-1])[number - 1] for number in CANDIDATES]
    rows = []
    for name, pool in pools.items():
        for gain in GAINS:
            gains = centred(pool, gain)
            found = first_promotions(drawn(gains, POWER_RACES, 8), POWER_RACES, OPEN_REQUESTS, alphas, config, bound)
            ruled = first_promotions(
                drawn(gains, POWER_RACES, 9), POWER_RACES, config.max_requests, alphas, config, bound, has_rules=True
            )
            for number, alpha, free, held in zip(CANDIDATES, alphas, found, ruled, strict=True):
                num_held = int(np.isfinite(held).sum())
                rows.append(
                    {
                        "test": config.test,
                        "differences": name,
                        "gain": gain,
                        "candidate": number,
                        "alpha": round(alpha, 5),
                        "median_requests": median(free),
                        "within": {str(n): float((free <= n).mean()) for n in (100, 300, 1000, OPEN_REQUESTS)},
                        "promoted_with_rules": num_held / POWER_RACES,
                        "interval": wilson(num_held, POWER_RACES),
                        "median_requests_of_those": median(held[np.isfinite(held)]) if num_held else None,
                    }
                )
    return rows


def race_through(gains, labels, bound, config):
    """A verdict of the gate's own race; None where it goes on. labels: of each request, as the race takes them."""
    race = Race("candidate", "incumbent", int(bound), config.alpha, config, frozen_at_s=0.0)
    for number, (gain, label) in enumerate(zip(gains.tolist(), labels, strict=True), start=1):
        group = b"%d" % number
        race.admits(float(number), group, ())
        verdict = race.observe(
            number,
            Walked(4 * WALK_STEPS, WALK_STEPS),
            Walked(round((4 + gain) * WALK_STEPS), WALK_STEPS),
            group,
            started_s=float(number),
            now_s=float(number),
            fidelity="complete",
            slices=label,
        )
        if verdict is not None:
            return verdict
    return None


def replayed(pool, bound, config):
    """The arrays of this benchmark against the races of the sidecar, on the same gains."""
    gains = np.round(centred(pool, 0.1), 6)[
        np.random.default_rng(10).integers(len(pool), size=(REPLAYED_RACES, config.max_requests))
    ]
    at = first_promotions(
        lambda number: gains[:, number - 1],
        REPLAYED_RACES,
        config.max_requests,
        [config.alpha],
        config,
        bound,
        has_rules=True,
    )[0]
    verdicts = [race_through(row, [{}] * len(row), bound, config) for row in gains]
    theirs = [verdict.num_requests if verdict.decision == "promote" else np.inf for verdict in verdicts]
    return {"test": config.test, "races": REPLAYED_RACES, "equal": int(np.sum(at == theirs))}


def slices(pool, bound, config):
    """One tenant apart from the others: how often the candidate is promoted. gains: of the others, of that tenant."""
    rows = []
    for share, others, slice_gain in (
        (0.35, 0.5, -0.4),
        (0.35, 0.5, -0.25),
        (0.35, 0.5, -0.2),
        (0.15, 0.3, -0.4),
        (0.35, 0.2, 0.2),
        (0.35, 0.5, 0.5),
    ):
        random, verdicts = np.random.default_rng(11), []
        for _ in range(SLICE_RACES):
            is_slice = random.random(config.max_requests) < share
            noise = centred(pool, 0.0)[random.integers(len(pool), size=config.max_requests)]
            gains = (noise + np.where(is_slice, slice_gain, others)).clip(-bound, bound)
            labels = [slice_labels("b" if is_it else "a", 0, 70, 0.0) for is_it in is_slice.tolist()]
            verdicts.append(race_through(gains, labels, bound, config))
        promoted = [verdict.num_requests for verdict in verdicts if verdict.decision == "promote"]
        dropped = [verdict.num_requests for verdict in verdicts if verdict.decision == "drop"]
        is_worse = slice_gain <= -config.slice_tolerance_tokens and share >= config.slice_min_frac
        rows.append(
            {
                "test": config.test,
                "share": share,
                "gain_of_others": others,
                "gain_of_slice": slice_gain,
                "mean_gain": round((1 - share) * others + share * slice_gain, 4),
                "races": SLICE_RACES,
                "promised": config.slice_alpha if is_worse else None,
                "promoted": len(promoted) / SLICE_RACES,
                "interval": wilson(len(promoted), SLICE_RACES),
                "median_requests_to_promote": median(promoted) if promoted else None,
                "median_requests_to_refuse": median(dropped) if dropped else None,
            }
        )
    return rows


def read_pools(path):
    """{name: differences of code requests}, and the largest magnitude one may have."""
    report = json.loads(path.read_text())
    rows, first = report["requests"]["code"], f"seed {SEEDS[0]}"
    pairs = {
        "two seeds": (f"seed {SEEDS[1]}", first),
        "40 steps apart": (first, f"{first}, {STEPS_APART} steps earlier"),
    }
    pools = {name: np.array([row[after] - row[before] for row in rows]) for name, (after, before) in pairs.items()}
    assert all(pool.any() for pool in pools.values()), "all-zero differences are no null"
    return pools, float(report["draft_steps"])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--record", type=Path, metavar="STREAMS")
    parser.add_argument("--differences", type=Path, default=DIFFERENCES)
    parser.add_argument("--parts", default=",".join(PARTS), help="of the report, with commas between")
    options = parser.parse_args()
    if options.record:
        record(options.record, options.out)
        return
    began_s = time.process_time()
    pools, bound = read_pools(options.differences)
    report = {**provenance(), "numpy": np.__version__, "config": {}, "pools": {}}
    report["pools"] = {
        name: {"requests": len(pool), "mean": round(float(pool.mean()), 4), "sd": round(float(pool.std()), 4)}
        for name, pool in pools.items()
    }
    two_seeds = pools["two seeds"]
    parts = {
        "false_promotions": lambda config: false_promotions(pools, bound, config),
        "lives": lambda config: [lives(two_seeds, bound, config)],
        "power": lambda config: power(pools, bound, config),
        "slices": lambda config: slices(two_seeds, bound, config),
        "replayed": lambda config: [replayed(two_seeds, bound, config)],
    }
    for test in TESTS:
        config = GateConfig(test=test)
        report["config"] = {name: getattr(config, name) for name in config.__struct_fields__}
        for part in options.parts.split(","):
            report.setdefault(part, []).extend(parts[part](config))
            print(test, part, round(time.process_time() - began_s), "CPU s", flush=True)
    report["cpu_s"] = round(time.process_time() - began_s)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    if "power" in report:
        plot(report, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
