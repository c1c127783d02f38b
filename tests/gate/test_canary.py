"""Harm and step cost in live traffic, from blocks in coin-tossed order."""

import json
import math
import statistics

import msgspec
import numpy as np
import pytest

from onlinespec.config import CanaryConfig
from onlinespec.gate.canary import Block, Canary, Half, SignTest

CONFIG = CanaryConfig(alpha=0.05, harm_tolerance_tokens=0.1, max_step_cost_ratio=1.1, min_pairs=8, max_pairs=400)
CANDIDATE, INCUMBENT, DEPTH = 7, 6, 3


def a_block(pair: int, version: int, accept: float = 2.0, wall_s: float = 0.16, **changes) -> Block:
    """16 decode steps of one request."""
    facts = {"num_draft_steps": DEPTH, "decode_steps": 16, "request_steps": 16, "mean_running": 1.0}
    facts |= {"tokens": round(16 * accept), "wall_s": wall_s}
    return Block(**{"pair": pair, "version": version, **facts, **changes})


def a_canary(config: CanaryConfig = CONFIG, **options) -> Canary:
    return Canary(config, CANDIDATE, INCUMBENT, DEPTH, started_s=0.0, **options)


class Server:
    """Alternates blocks of verify steps. effect: what the candidate changes the accept length by."""

    def __init__(self, seed: int, effect: float, cost: float = 1.0, spread: float = 0.05, trend=lambda block: 0.0):
        self.rng = np.random.default_rng(seed)
        self.effect, self.cost, self.spread, self.trend = effect, cost, spread, trend

    def block(self, pair: int, version: int, place: int) -> Block:
        is_candidate = version == CANDIDATE
        mean = 2.2 + self.trend(2 * pair + place) + self.effect * is_candidate
        share = min(max((mean - 1) / DEPTH, 0.0), 1.0)
        tokens = 16 + int(self.rng.binomial(16 * DEPTH, share))
        wall_s = 0.16 * math.exp(self.rng.normal(0.0, self.spread)) * (self.cost if is_candidate else 1.0)
        return a_block(pair, version, wall_s=wall_s, tokens=tokens)

    def run(self, canary: Canary):
        """Blocks until the verdict."""
        for pair in range(10_000):
            order = [CANDIDATE, INCUMBENT]
            self.rng.shuffle(order)
            for place, version in enumerate(order):
                verdict = canary.observe(self.block(pair, version, place), now_s=0.32 * pair)
                if verdict is not None:
                    return verdict
        raise AssertionError("a canary ends at max_pairs")


def outcomes(num: int, *args, config: CanaryConfig = CONFIG, **options):
    return [Server(seed, *args, **options).run(a_canary(config)) for seed in range(num)]


def share(verdicts, outcome: str) -> float:
    return sum(verdict.outcome == outcome for verdict in verdicts) / len(verdicts)


@pytest.mark.parametrize(("effect", "most_pairs"), [(0.0, 160), (0.2, 60), (0.5, 35)])
def test_a_harmless_candidate_passes(effect: float, most_pairs: int):
    verdicts = outcomes(40, effect)

    assert share(verdicts, "pass") >= 0.95
    assert statistics.median(verdict.num_pairs for verdict in verdicts) <= most_pairs


def test_a_candidate_at_the_edge_of_harm_seldom_passes():
    verdicts = outcomes(100, -0.1, config=msgspec.structs.replace(CONFIG, max_pairs=200))

    assert share(verdicts, "pass") <= 0.05
    assert share(verdicts, "harm") <= 0.05


def test_a_harmful_candidate_is_stopped_early():
    verdicts = outcomes(40, -1.0)

    assert share(verdicts, "harm") == 1.0
    assert statistics.median(verdict.num_pairs for verdict in verdicts) <= 15


def test_a_trend_of_the_traffic_blames_nobody_because_the_order_is_tossed():
    trend = {"trend": lambda block: -0.4 * (block % 2)}

    verdicts = outcomes(60, 0.0, **trend)
    edge = outcomes(60, -0.1, config=msgspec.structs.replace(CONFIG, max_pairs=200), **trend)

    assert share(verdicts, "pass") >= 0.9
    assert share(verdicts, "harm") <= 0.05
    assert share(edge, "pass") <= 0.05


def test_without_the_coin_the_same_trend_would_be_blamed():
    """What the coin is for: the candidate always second, and each second block harder."""
    canary = a_canary()

    for pair in range(400):
        canary.observe(a_block(pair, INCUMBENT, 2.5), now_s=0.0)
        verdict = canary.observe(a_block(pair, CANDIDATE, 2.0), now_s=0.0)
        if verdict is not None:
            break

    assert canary.verdict.outcome == "harm"
    assert canary.verdict.num_candidate_first == 0


def test_a_dear_candidate_is_refused_however_well_it_drafts():
    verdicts = outcomes(40, 0.3, 1.4)

    assert share(verdicts, "cost") == 1.0
    assert verdicts[0].step_cost_ratio == pytest.approx(1.4, rel=0.1)


def test_a_candidate_at_the_cost_limit_seldom_passes():
    assert share(outcomes(60, 0.5, 1.1, spread=0.2), "pass") <= 0.05


def test_a_stall_of_the_machine_costs_little_evidence():
    config = msgspec.structs.replace(CONFIG, max_pairs=40)
    canary = a_canary(config)
    for pair in range(400):
        canary.observe(a_block(pair, CANDIDATE, 2.5, wall_s=20.0 if pair == 5 else 0.16), now_s=0.0)
        if canary.observe(a_block(pair, INCUMBENT, 2.0), now_s=0.0):
            break

    assert canary.verdict.outcome == "pass"


def test_what_stays_open_is_refused_and_names_what_was_not_shown():
    config = msgspec.structs.replace(CONFIG, max_pairs=10)

    verdict = Server(0, 0.0).run(a_canary(config))

    assert verdict.outcome == "undecided"
    assert not verdict.is_passed
    assert "not shown harmless in accept length" in verdict.reason


def test_a_pass_waits_for_its_least_number_of_pairs():
    config = msgspec.structs.replace(CONFIG, alpha=0.5, min_pairs=30)

    verdict = Server(0, 1.0).run(a_canary(config))

    assert (verdict.outcome, verdict.num_pairs) == ("pass", 30)


def test_lost_foreign_shallow_and_unusable_blocks_are_counted_and_no_pair():
    canary = a_canary()
    blocks = [
        a_block(0, CANDIDATE),  # its partner is lost
        a_block(1, INCUMBENT),
        a_block(1, 5),  # of another version
        a_block(1, CANDIDATE),  # pair 1
        a_block(1, CANDIDATE),  # late
        a_block(2, CANDIDATE),
        a_block(2, INCUMBENT, num_draft_steps=0, tokens=16),  # at depth 0
        a_block(3, CANDIDATE, request_steps=0, tokens=0),
        a_block(3, INCUMBENT, tokens=100),  # more than 4 each step
        a_block(3, INCUMBENT, wall_s=0.0),
        a_block(4, INCUMBENT),  # ends the wait for pair 2
        a_block(4, INCUMBENT),  # twice
        a_block(4, CANDIDATE),  # pair 4
        a_block(3, CANDIDATE),  # late
        a_block(5, CANDIDATE),
    ]

    for block in blocks:
        canary.observe(block, now_s=0.0)
    verdict = canary.withdraw("the test ends", now_s=1.0)

    assert (verdict.num_pairs, verdict.num_candidate_first) == (2, 0)
    assert verdict.num_dropped_unpaired == 6
    assert verdict.num_dropped_foreign == 1
    assert verdict.num_dropped_shallow == 1
    assert verdict.num_dropped_unusable == 3


def test_a_pair_is_one_block_of_each_draft_and_counts_once():
    canary = a_canary()
    blocks = [
        a_block(0, CANDIDATE, 2.5),
        a_block(0, CANDIDATE, 2.5),  # twice
        a_block(0, INCUMBENT),
        a_block(0, INCUMBENT),  # the pair comes again
        a_block(0, CANDIDATE, 3.0),
        a_block(2, CANDIDATE, 2.5),
        a_block(1, INCUMBENT),  # late
        a_block(2, INCUMBENT),
    ]

    for block in blocks:
        canary.observe(block, now_s=0.0)
    verdict = canary.withdraw("the test ends", now_s=1.0)

    assert (verdict.num_pairs, verdict.num_candidate_first, verdict.num_dropped_unpaired) == (2, 2, 4)
    assert verdict.mean_difference_tokens == pytest.approx(0.5)


def test_at_depth_zero_nothing_passes():
    canary = a_canary()

    for pair in range(500):
        for version in (CANDIDATE, INCUMBENT):
            canary.observe(a_block(pair, version, 1.0, num_draft_steps=0), now_s=0.0)

    assert canary.verdict is None
    assert canary.num_pairs == 0


def test_a_canary_without_pairs_is_withdrawn_and_a_pair_renews_its_time():
    canary = a_canary(msgspec.structs.replace(CONFIG, max_s=60.0))

    assert canary.expire(60.0) is None
    canary.observe(a_block(0, CANDIDATE), now_s=50.0)
    canary.observe(a_block(0, INCUMBENT), now_s=55.0)
    canary.observe(a_block(1, CANDIDATE), now_s=90.0)
    assert canary.expire(115.0) is None
    verdict = canary.expire(116.0)

    assert verdict.outcome == "withdrawn"
    assert "60 s" in verdict.reason
    assert canary.expire(500.0) is None


def test_carry_over_is_reported_from_the_halves_of_blocks_by_version():
    canary = a_canary()
    for pair in range(4):
        canary.observe(a_block(pair, CANDIDATE, halves=(Half(12, 8), Half(20, 8))), now_s=0.0)
        canary.observe(a_block(pair, INCUMBENT, halves=(Half(14, 8), Half(18, 8))), now_s=0.0)
    canary.observe(a_block(4, CANDIDATE, halves=(Half(0, 0), Half(32, 8))), now_s=0.0)
    canary.observe(a_block(4, INCUMBENT), now_s=0.0)

    verdict = canary.withdraw("the test ends", now_s=0.0)

    assert verdict.carry_over_candidate_tokens == pytest.approx(1.0)
    assert verdict.carry_over_incumbent_tokens == pytest.approx(0.5)
    assert a_canary().withdraw("none came", now_s=0.0).carry_over_candidate_tokens is None


@pytest.mark.parametrize(
    ("is_kv_stable", "effect", "wanted"),
    [(False, 0.5, "not judged"), (True, 0.5, "shown"), (True, -0.02, "not shown")],
)
def test_superiority_is_judged_only_where_cached_kv_is_the_same_for_both(is_kv_stable, effect, wanted):
    """A pass waits for it, up to max_pairs, and does not depend on it."""
    verdict = Server(1, effect).run(a_canary(is_kv_stable=is_kv_stable))

    assert (verdict.outcome, verdict.superiority) == ("pass", wanted)


def test_a_verdict_is_json_with_finite_numbers():
    verdict = Server(0, -1.0).run(a_canary())

    read = json.loads(msgspec.json.encode(verdict))

    assert read["outcome"] == "harm"
    assert read["e_harm"] >= read["threshold"] == 20.0
    assert read["mean_difference_tokens"] == pytest.approx(-1.0, abs=0.3)


def test_a_sign_test_is_the_product_of_odd_bets_fixed_by_the_past():
    values = [0.1, -0.3, 0.2, 5.0, -40.0, 0.1]
    test = SignTest(0.1, 0.1)

    wealth, total, squares = 1.0, 4 * 0.1, 4 * (0.1**2 + 0.1**2)
    for value in values:
        test.observe(value)
        wealth *= 1 + 0.9 * math.tanh(max(total / squares, 0.0) * value)
        clipped = min(max(value, -0.3), 0.3)
        total += clipped
        squares += clipped * clipped

    assert test.log_wealth == pytest.approx(math.log(wealth))


def test_a_sign_test_keeps_its_level_on_heavy_tails_about_zero():
    """Cauchy: no mean, no variance. 1,000 streams of 200."""
    rejected = 0
    for stream in (0.05 * np.random.default_rng(3).standard_cauchy((1000, 200))).tolist():
        test = SignTest(0.1, 0.1)
        for value in stream:
            test.observe(value)
            if test.has_rejected(0.05):
                rejected += 1
                break

    assert rejected / 1000 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_a_stall_takes_nine_tenths_of_a_sign_tests_wealth_at_most():
    test = SignTest(0.1, 0.1)

    test.observe(-1e6)

    assert test.e_value == pytest.approx(0.1)
