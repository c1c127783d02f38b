"""Whether a candidate hurts in live traffic: pairs of blocks, one by each draft, in an order that a coin tossed.

The server alternates two resident drafts in blocks of decode steps and reports each block without the first verify
after a change, whose first drafted token is the other draft's. Two adjacent blocks are a pair. Its difference is
accept length of the candidate's block minus that of the incumbent's.

What the coin buys. Call what each draft would have reached in the first and in the second block c1, i1, c2, i2; the
traffic may choose these four numbers as it likes, trend, bursts and all, as long as it does not foresee the coin.
Heads shows c1 - i2, tails c2 - i1: the mean over the coin is ((c1 - i1) + (c2 - i2)) / 2, the candidate's own effect
on this pair, whatever the trend. So "effect >= -harm_tolerance_tokens" is a statement about the mean of each
difference given the past, the differences are bounded by K, and the betting e-process (`eprocess`) tests it at every
pair. Nothing is assumed of the requests: turns of one conversation may fill a canary, the coin is the only chance
that is used. Two such tests run, for harm (H0: no harm) and for harmlessness (H0: harm beyond the tolerance).
Differences are not clipped as the race's are: where the traffic turns between two blocks by more than a clip, c1 - i2
and c2 - i1 are cut unequally, and their mean is the effect no more. So a pair's evidence is limited by the bound K
and seldom by its noise, and short blocks decide in fewer decode steps (`benchmarks/guard_delay.py`).

Step cost is seconds per decode step. Its ratio is not bounded (one stall of the machine is a factor of ten), so its
test uses the coin otherwise: where the candidate costs the same factor c in both blocks, the log-ratio is log c plus
or minus the log of how the blocks differ, each sign by the coin. It is symmetric about log c however heavy its
tails, and for x symmetric about a centre <= 0 and a bet fixed by the past, the mean of 1 + 0.9 tanh(bet * x) is at
most 1: tanh is odd and grows. One stall moves the evidence by a factor of 0.1 to 1.9, however long it lasted.

A pair counts only if both blocks came, at full depth. Samples are lost where the sender's queue is full, which
depends on the traffic and not on which draft's block it is; what is lost is counted.

What is not claimed. The levels are of one canary. Blocks are taken not to act on each other, and they do a little: KV
that one draft wrote is stale for the other, so each is measured on a mixture, which mostly shrinks differences towards
0. A verdict therefore decides harm and cost; that a candidate is better is the race's to show. Only where cached KV is
the same for both (`trainer.kv_mode` stable) is `superiority` judged: a pass then waits for it, up to `max_pairs`, and
does not depend on it. The size of the carry-over is reported from the halves of blocks: a draft whose second halves
beat its first ones gains as its own KV fills in, and this is a lower bound, since what lies further back stays mixed.
It decides nothing.

Source: Waudby-Smith and Ramdas 2024 for the bounded mean (`eprocess`); de la Pena, "A general class of exponential
inequalities for martingales and ratios", Annals of Probability 1999, for bets on symmetric differences.
"""

import math
from dataclasses import dataclass
from typing import Literal

import msgspec

from onlinespec.config import CanaryConfig
from onlinespec.gate.eprocess import Betting

Outcome = Literal["pass", "harm", "cost", "undecided", "withdrawn"]
Superiority = Literal["not judged", "shown", "not shown"]

_PRIOR_PAIRS = 4.0
_PRIOR_SPREAD = 0.1
"""of log-ratios of step cost, before any was seen"""
_MOST_STAKED = 0.9
"""share of its wealth a sign test can lose to one pair"""
_STALL = 0.3
"""a log-ratio counts as this at most in the choice of later bets: one stall must not make them timid"""


@dataclass(frozen=True)
class Half:
    """The first or second part of a block. Units: tokens committed; verify steps summed over requests."""

    tokens: int
    request_steps: int


@dataclass(frozen=True)
class Block:
    """What the server reports of one block, the first verify after the change left out.

    pair: index of the pair, rising. num_draft_steps: the depth it ran at. tokens: committed, bonus counted.
    request_steps: verify steps summed over requests. decode_steps: those whose time could be compared, wall_s theirs.
    halves: None where the server does not report them.
    """

    pair: int
    version: int
    num_draft_steps: int
    decode_steps: int
    tokens: int
    request_steps: int
    wall_s: float
    mean_running: float
    halves: tuple[Half, Half] | None = None


class CanaryVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """How a canary ended, with its numbers. JSON-able; what has no pair to be computed from is 0 or None."""

    outcome: Outcome
    reason: str
    candidate_version: int
    incumbent_version: int
    num_pairs: int
    num_candidate_first: int
    """pairs whose first block was the candidate's: about half, or the coin is not one"""
    mean_difference_tokens: float
    """mean over pairs of candidate minus incumbent accept length, live"""
    e_harm: float
    """evidence against `no harm`"""
    e_harmless: float
    """evidence against `harm beyond the tolerance`"""
    e_dear: float
    """evidence against `step cost within max_step_cost_ratio`"""
    e_cheap: float
    """evidence against `step cost above max_step_cost_ratio`"""
    threshold: float
    """e-value that decides, 1 / alpha"""
    step_cost_ratio: float
    """geometric mean over pairs of the candidate's seconds per decode step over the incumbent's"""
    token_cost_ratio: float
    """the same of seconds per token: below 1 the candidate is faster; descriptive"""
    mean_running: float
    """requests running, mean over counted blocks"""
    superiority: Superiority
    """whether a live gain above 0 was shown; judged in KV-stable mode only"""
    carry_over_candidate_tokens: float | None
    """accept length of second halves of blocks minus first halves; None without halves"""
    carry_over_incumbent_tokens: float | None
    num_dropped_unpaired: int
    """blocks whose partner did not come, or that came twice or late"""
    num_dropped_foreign: int
    """blocks of other versions"""
    num_dropped_shallow: int
    """blocks not run at full depth: at depth 0 all drafts are equal"""
    num_dropped_unusable: int
    """blocks without a verify step, without time, or with more or fewer tokens than steps allow"""
    decided_at_s: float

    @property
    def is_passed(self) -> bool:
        return self.outcome == "pass"


class SignTest:
    """Anytime-valid evidence that values symmetric about an unknown centre have it above 0 (the module's docstring)."""

    def __init__(self, prior_mean: float, prior_spread: float):
        self.log_wealth = 0.0
        self._sum = _PRIOR_PAIRS * prior_mean
        self._sum_squares = _PRIOR_PAIRS * (prior_mean**2 + prior_spread**2)

    def observe(self, value: float) -> None:
        """Bet on one value, with a stake from the past alone."""
        bet = max(self._sum / self._sum_squares, 0.0)
        self.log_wealth += math.log1p(_MOST_STAKED * math.tanh(bet * value))
        clipped = max(-_STALL, min(value, _STALL))
        self._sum += clipped
        self._sum_squares += clipped * clipped

    @property
    def e_value(self) -> float:
        """Wealth, kept finite for JSON."""
        return math.exp(min(self.log_wealth, 700.0))

    def has_rejected(self, alpha: float) -> bool:
        """True where wealth stands at 1 / alpha or above."""
        return self.log_wealth >= -math.log(alpha)


def _tokens_per_step(block: Block) -> float:
    """Of all running requests."""
    return block.tokens / block.request_steps * block.mean_running


class CarryOver:
    """Second halves of one draft's blocks against first halves."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._num = 0

    def observe(self, halves: tuple[Half, Half] | None) -> None:
        if halves is not None and halves[0].request_steps and halves[1].request_steps:
            first, second = (half.tokens / half.request_steps for half in halves)
            self._sum += second - first
            self._num += 1

    @property
    def tokens(self) -> float | None:
        return self._sum / self._num if self._num else None


class Canary:
    """One candidate against the incumbent in live traffic. After its verdict a canary takes no more.

    Units: `started_s` and every `now_s` are seconds of any one clock. `is_kv_stable`: cached draft KV is the same
    whichever of the two wrote it. Memory: constant; one block waits for its partner.
    """

    def __init__(
        self,
        config: CanaryConfig,
        candidate_version: int,
        incumbent_version: int,
        num_draft_steps: int,
        *,
        started_s: float,
        is_kv_stable: bool = False,
    ):
        assert candidate_version != incumbent_version, candidate_version
        self.candidate_version = candidate_version
        self.incumbent_version = incumbent_version
        self.verdict: CanaryVerdict | None = None
        self.num_pairs = 0
        self.num_candidate_first = 0
        self.num_dropped_unpaired = 0
        self.num_dropped_foreign = 0
        self.num_dropped_shallow = 0
        self.num_dropped_unusable = 0
        self._config = config
        self._num_draft_steps = num_draft_steps
        self._is_kv_stable = is_kv_stable
        self._log_max_ratio = math.log(config.max_step_cost_ratio)
        bound, tolerance = float(num_draft_steps), config.harm_tolerance_tokens
        self._harm = Betting(bound, tolerance)
        self._harmless = Betting(bound, -tolerance)
        self._better = Betting(bound, 0.0)
        self._dear = SignTest(self._log_max_ratio, _PRIOR_SPREAD)
        self._cheap = SignTest(self._log_max_ratio, _PRIOR_SPREAD)
        self._carry_over = {candidate_version: CarryOver(), incumbent_version: CarryOver()}
        self._open: Block | None = None
        self._next_pair = 0
        self._paired_s = started_s
        self._sum_difference = 0.0
        self._sum_log_step_cost = 0.0
        self._sum_log_token_cost = 0.0
        self._sum_running = 0.0

    def observe(self, block: Block, *, now_s: float) -> CanaryVerdict | None:
        """Take one block; the verdict where it decides. Blocks come in the order in which they ran."""
        assert self.verdict is None, "the canary is over"
        if not self._counts(block):
            return None
        if self._open is None or self._open.pair != block.pair or self._open.version == block.version:
            self.num_dropped_unpaired += self._open is not None
            self._open, self._next_pair = block, block.pair
            return None
        first, self._open = self._open, None
        self._next_pair = block.pair + 1
        self._paired_s = now_s
        self._take(first, block)
        return self._decide(now_s)

    def expire(self, now_s: float) -> CanaryVerdict | None:
        """Withdraw where no pair has come for `max_s`: no traffic, or the server does not alternate."""
        if self.verdict is None and now_s - self._paired_s > self._config.max_s:
            return self.withdraw(f"no complete pair of blocks came for {self._config.max_s:.0f} s", now_s=now_s)
        return None

    def withdraw(self, reason: str, *, now_s: float) -> CanaryVerdict:
        """End the canary from outside: the incumbent changed, the process stops."""
        assert self.verdict is None, "the canary is over"
        return self._end("withdrawn", reason, now_s)

    def _counts(self, block: Block) -> bool:
        """Sort a block out, and count why."""
        if block.version not in self._carry_over:
            self.num_dropped_foreign += 1
        elif block.num_draft_steps != self._num_draft_steps:
            self.num_dropped_shallow += 1
        elif not (block.decode_steps and block.wall_s > 0.0 and self._has_tokens(block)):
            self.num_dropped_unusable += 1
        elif block.pair < self._next_pair:
            self.num_dropped_unpaired += 1
        else:
            return True
        return False

    def _has_tokens(self, block: Block) -> bool:
        """Each verify step commits 1 to K + 1 tokens: the bound that the e-processes rest on."""
        return 0 < block.request_steps <= block.tokens <= (self._num_draft_steps + 1) * block.request_steps

    def _take(self, first: Block, second: Block) -> None:
        is_candidate_first = first.version == self.candidate_version
        candidate, incumbent = (first, second) if is_candidate_first else (second, first)
        difference = candidate.tokens / candidate.request_steps - incumbent.tokens / incumbent.request_steps
        step_cost = math.log((candidate.wall_s / candidate.decode_steps) / (incumbent.wall_s / incumbent.decode_steps))
        token_cost = step_cost - math.log(_tokens_per_step(candidate) / _tokens_per_step(incumbent))
        self._harm.observe(-difference)
        self._harmless.observe(difference)
        self._better.observe(difference)
        self._dear.observe(step_cost - self._log_max_ratio)
        self._cheap.observe(self._log_max_ratio - step_cost)
        for block in (first, second):
            self._carry_over[block.version].observe(block.halves)
        self.num_pairs += 1
        self.num_candidate_first += is_candidate_first
        self._sum_difference += difference
        self._sum_log_step_cost += step_cost
        self._sum_log_token_cost += token_cost
        self._sum_running += (first.mean_running + second.mean_running) / 2

    def _decide(self, now_s: float) -> CanaryVerdict | None:
        """First rule that applies; None while the canary goes on."""
        config = self._config
        said = f"accept length {self._sum_difference / self.num_pairs:+.3f} tokens and step cost"
        said += f" x{math.exp(self._sum_log_step_cost / self.num_pairs):.3f} over {self.num_pairs} live pairs"
        if self._harm.has_rejected(config.alpha):
            reason = f"{said}: a loss of more than {config.harm_tolerance_tokens:g} tokens is shown"
            return self._end("harm", reason, now_s)
        if self._dear.has_rejected(config.alpha):
            return self._end("cost", f"{said}: a step cost above x{config.max_step_cost_ratio:g} is shown", now_s)
        is_harmless = self._harmless.has_rejected(config.alpha)
        is_cheap = self._cheap.has_rejected(config.alpha)
        is_last = self.num_pairs >= config.max_pairs
        is_waiting = self._superiority() == "not shown" and not is_last
        if is_harmless and is_cheap and self.num_pairs >= config.min_pairs and not is_waiting:
            return self._end("pass", f"{said}: shown harmless", now_s)
        if is_last:
            missing = [name for name, shown in (("accept length", is_harmless), ("step cost", is_cheap)) if not shown]
            return self._end("undecided", f"{said}: not shown harmless in {' and '.join(missing)}", now_s)
        return None

    def _superiority(self) -> Superiority:
        if not self._is_kv_stable:
            return "not judged"
        return "shown" if self._better.has_rejected(self._config.alpha) else "not shown"

    def _end(self, outcome: Outcome, reason: str, now_s: float) -> CanaryVerdict:
        num_pairs = max(self.num_pairs, 1)
        self.verdict = CanaryVerdict(
            outcome=outcome,
            reason=reason,
            candidate_version=self.candidate_version,
            incumbent_version=self.incumbent_version,
            num_pairs=self.num_pairs,
            num_candidate_first=self.num_candidate_first,
            mean_difference_tokens=self._sum_difference / num_pairs,
            e_harm=self._harm.e_value,
            e_harmless=self._harmless.e_value,
            e_dear=self._dear.e_value,
            e_cheap=self._cheap.e_value,
            threshold=1.0 / self._config.alpha,
            step_cost_ratio=math.exp(self._sum_log_step_cost / num_pairs),
            token_cost_ratio=math.exp(self._sum_log_token_cost / num_pairs),
            mean_running=self._sum_running / num_pairs,
            superiority=self._superiority(),
            carry_over_candidate_tokens=self._carry_over[self.candidate_version].tokens,
            carry_over_incumbent_tokens=self._carry_over[self.incumbent_version].tokens,
            num_dropped_unpaired=self.num_dropped_unpaired + (self._open is not None),
            num_dropped_foreign=self.num_dropped_foreign,
            num_dropped_shallow=self.num_dropped_shallow,
            num_dropped_unusable=self.num_dropped_unusable,
            decided_at_s=now_s,
        )
        return self.verdict
