"""One-sided e-processes: evidence that a mean exceeds a threshold, readable at every look.

H0: given the past, a difference has mean <= threshold. An e-process starts at 1 and is, under H0, a nonnegative
supermartingale: by Ville's inequality the chance that it *ever* reaches 1/alpha is at most alpha, so stopping at
the first crossing costs nothing. A difference counts for at most `bound` either way, and H0 is about differences so
limited; nothing else is assumed of them. Where the differences are negated and the threshold too, it is evidence that
the mean lies below.

Two of them, with x = d - threshold:

`Betting` stakes a share chosen before seeing d: wealth *= 1 + bet * x. The bet is a Kelly estimate, mean /
(variance + mean^2), of the past shrunk towards a prior. What limits the speed is its cap of 0.95 / (bound +
threshold), which keeps a worst case difference from ruining the gambler, not the estimate: gains of 0.05 tokens and
more all want to bet above the cap. The prior therefore bets the cap from the first difference on, and the past
lowers it only where there is nothing to win. No capital process of bounded differences grows much faster: a gain of
g even without any noise asks log(1/alpha) / log(1 + (g - threshold) / (bound + threshold)).

`Bernstein`, the conservative choice, is the predictable plug-in empirical Bernstein e-process: wealth *= exp(bet *
x - v * psi(bet)), with v the squared distance of d from the mean m of the past and psi(b) = -log(1 - b) - b, all in
units of a scale. By Fan's inequality exp(b y - y^2 psi(b)) <= 1 + b y for y >= -1 and 0 <= b < 1; with y = (d - m)
/ scale this bounds the factor's mean by exp(b (m - threshold)) (1 - b (m - threshold)) <= 1. Only y >= -1 is used,
and m is known before d, so the scale is bound + m: half of the range that a mean which might lie anywhere would ask
for. The bet maximises b y - y^2 psi(b) at the past's sums. It pays for the spread of the differences throughout: it
asks more requests, and is rejected by luck far less often than alpha.

H0 is about each difference given the past. Differences that share a hidden cause (the turns of one conversation)
break it, so the caller passes one of each; and where the mean gain moves with the traffic, a period of gains is
enough to reject.

All of it is arithmetic on floats and numpy arrays alike: the sidecar observes one difference at a time,
`benchmarks/bench_gate.py` one of each of ten thousand races.

Source: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS-B 2024: section 4
(capital process) and appendix B (approximate Kelly bets); section 3.2 (predictable plug-in empirical Bernstein).
Fan's inequality: Fan, Grama and Liu 2015, "Exponential inequalities for martingales with applications", proposition
4.1.
"""

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

Numbers = float | npt.NDArray[np.float64]
"""one stream's number, or one of each stream"""

MAX_BET_FRAC = 0.95
PRIOR_REQUESTS = 8.0
PRIOR_GAIN_TOKENS = 0.3
PRIOR_VARIANCE = 0.05
MAX_LOG_E = 700.0


class EProcess:
    """What both share: the wealth after the differences seen so far, kept as a logarithm.

    Units: `bound_tokens` is the most that a difference in accept length counts for, `threshold_tokens` the mean that H0
    allows, of either sign. Shapes: none for one stream, [S] for S of them; the first difference says which.
    """

    def __init__(self, bound_tokens: float, threshold_tokens: float):
        assert bound_tokens > abs(threshold_tokens), (bound_tokens, threshold_tokens)
        self.bound_tokens = bound_tokens
        self.threshold_tokens = threshold_tokens
        self.log_wealth: Numbers = 0.0
        self._sum: Numbers = PRIOR_REQUESTS * PRIOR_GAIN_TOKENS
        self._sum_squares: Numbers = PRIOR_REQUESTS * (PRIOR_VARIANCE + PRIOR_GAIN_TOKENS**2)

    @property
    def bet(self) -> Numbers:
        """Share staked on the next difference: a function of the past alone."""
        raise NotImplementedError

    def _log_factor(self, excess_tokens: Numbers) -> Numbers:
        """What the wealth is multiplied by, as a logarithm. Called before the difference enters the sums."""
        raise NotImplementedError

    @property
    def e_value(self) -> float:
        """Wealth of a single stream, kept finite for JSON."""
        return math.exp(min(self.log_wealth, MAX_LOG_E))

    def observe(self, difference_tokens: Numbers) -> None:
        """Bet on one paired difference, candidate minus incumbent, of each stream."""
        excess = np.clip(difference_tokens, -self.bound_tokens, self.bound_tokens) - self.threshold_tokens
        self.log_wealth = self.log_wealth + self._log_factor(excess)
        self._sum = self._sum + excess
        self._sum_squares = self._sum_squares + excess * excess

    def has_rejected(self, alpha: Numbers) -> npt.NDArray[np.bool_] | np.bool_:
        """True where wealth stands at 1 / alpha or above."""
        return np.greater_equal(self.log_wealth, -np.log(alpha))


class Betting(EProcess):
    """See the module's docstring. Units of a bet: 1 / tokens."""

    @property
    def bet(self) -> Numbers:
        # variance + mean^2 is the mean square, so the Kelly estimate is a ratio of two sums.
        most = MAX_BET_FRAC / (self.bound_tokens + self.threshold_tokens)
        return np.minimum(np.maximum(self._sum / self._sum_squares, 0.0), most)

    def _log_factor(self, excess_tokens: Numbers) -> Numbers:
        return np.log1p(self.bet * excess_tokens)


class Bernstein(EProcess):
    """See the module's docstring. Units of a bet: none."""

    def __init__(self, bound_tokens: float, threshold_tokens: float):
        super().__init__(bound_tokens, threshold_tokens)
        self._num = 0
        self._sum_deviations: Numbers = PRIOR_REQUESTS * PRIOR_VARIANCE

    @property
    def _mean(self) -> Numbers:
        """Of the past's excess, shrunk towards none."""
        prior = PRIOR_REQUESTS * PRIOR_GAIN_TOKENS
        return (self._sum - prior) / (self._num + PRIOR_REQUESTS)

    @property
    def _scale(self) -> Numbers:
        """Bound of how far a difference may fall below the mean of the past. Units: tokens."""
        return self.bound_tokens + self.threshold_tokens + self._mean

    @property
    def bet(self) -> Numbers:
        gain = np.maximum(self._sum, 0.0) * self._scale
        return np.minimum(gain / (gain + self._sum_deviations), MAX_BET_FRAC)

    def _log_factor(self, excess_tokens: Numbers) -> Numbers:
        bet, scale, deviation = self.bet, self._scale, excess_tokens - self._mean
        self._num += 1
        self._sum_deviations = self._sum_deviations + deviation * deviation
        psi = -np.log1p(-bet) - bet
        return bet * excess_tokens / scale - (deviation / scale) ** 2 * psi


def build_test(test: Literal["betting", "bernstein"], bound_tokens: float, threshold_tokens: float) -> EProcess:
    """The e-process that `gate.test` names."""
    return {"betting": Betting, "bernstein": Bernstein}[test](bound_tokens, threshold_tokens)
