"""A one-sided betting e-process: evidence that a mean exceeds a threshold, readable at every look.

H0: given the past, a difference has mean <= min_gain. A gambler starts with 1 and on each difference d
stakes a share `bet` chosen before seeing it: wealth *= 1 + bet * (d - min_gain). Under H0 no factor has a
mean above 1, so wealth is a nonnegative supermartingale, and by Ville's inequality the chance that it
*ever* reaches 1/alpha is at most alpha: stopping at the first crossing costs nothing. Nothing is assumed
of the differences beyond |d| <= bound.

The bet is a Kelly estimate, mean / (variance + mean^2), of the past shrunk towards a prior. What limits
the speed is its cap of 0.95 / (bound + min_gain), which keeps a worst case difference from ruining the
gambler, not the estimate: gains of 0.05 tokens and more all want to bet above the cap. The prior therefore
bets the cap from the first difference on, and the past lowers it only where there is nothing to win.

H0 is about each difference given the past. Differences that share a hidden cause (the turns of one
conversation) break it, so the caller passes one of each; and where the mean gain moves with the traffic, a
period of gains is enough to reject.

Source: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS-B 2024,
section 4 (capital process) and appendix B (approximate Kelly bets).
"""

import math

MAX_BET_FRAC = 0.95
PRIOR_REQUESTS = 8.0
PRIOR_GAIN_TOKENS = 0.3
PRIOR_VARIANCE = 0.05
MAX_LOG_E = 700.0


class EProcess:
    """Wealth of the gambler after the differences seen so far, kept as a logarithm.

    Units: `bound_tokens` is the largest magnitude of a difference in accept length, `min_gain_tokens` the
    mean that H0 allows.
    """

    def __init__(self, bound_tokens: float, min_gain_tokens: float):
        assert bound_tokens > 0.0, bound_tokens
        assert min_gain_tokens >= 0.0, min_gain_tokens
        self.bound_tokens = bound_tokens
        self.min_gain_tokens = min_gain_tokens
        self.log_wealth = 0.0
        self._max_bet = MAX_BET_FRAC / (bound_tokens + min_gain_tokens)
        self._sum = PRIOR_REQUESTS * PRIOR_GAIN_TOKENS
        self._sum_squares = PRIOR_REQUESTS * (PRIOR_VARIANCE + PRIOR_GAIN_TOKENS**2)

    @property
    def bet(self) -> float:
        """Share staked on the next difference: a function of the past alone. Units: 1 / tokens."""
        # variance + mean^2 is the mean square, so the Kelly estimate is a ratio of two sums.
        return min(max(self._sum / self._sum_squares, 0.0), self._max_bet)

    @property
    def e_value(self) -> float:
        """Wealth, kept finite for JSON."""
        return math.exp(min(self.log_wealth, MAX_LOG_E))

    def observe(self, difference_tokens: float) -> None:
        """Bet on one paired difference, candidate minus incumbent."""
        assert abs(difference_tokens) <= self.bound_tokens, (difference_tokens, self.bound_tokens)
        excess = difference_tokens - self.min_gain_tokens
        self.log_wealth += math.log1p(self.bet * excess)
        self._sum += excess
        self._sum_squares += excess * excess

    def has_rejected(self, alpha: float) -> bool:
        """True where wealth stands at 1 / alpha or above."""
        return self.log_wealth >= -math.log(alpha)
