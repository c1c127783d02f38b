"""What error each candidate may spend, and how often one may come: a budget that renews with time.

A balance of expected false promotions accrues at `per_day` a day. It starts with one day's worth, which is also the
most it holds. A candidate is tested at min(alpha, balance / 10) and spends that, whatever becomes of its race;
nothing buys it back. So a server of any age tests its next candidate at a level that depends on the last day alone:
candidates every 3 minutes settle where each gets what accrued since the one before, and a quiet hour restores the
rest.

What is controlled: a false promotion is one of a candidate whose mean gain, on the traffic it was judged on, was at
no moment more than min_gain. By Ville's inequality each such candidate is promoted with probability at most its
level, whatever came before, and levels follow from times alone. So of the races begun in any window of T days the
expected number of false promotions is at most per_day * (T + 1), whatever the dependence between candidates. It is
an expected number: not the chance of any (FWER), nor a share of the promotions (FDR).

What is not: where the mean gain drifts, a period in which it exceeds min_gain is enough to promote, rightly so,
even if the gain is gone later: that is the guard's matter. And the budget is of one run directory.

Levels are folded from what the journal holds of each race, its time and its level: a restart loses nothing. Clocks
that go back add nothing.

Source of the bound: Ville 1939; the renewal is ours.
"""

from collections.abc import Iterable, Sequence

from onlinespec.config import GateConfig

DAY_S = 86_400.0
HOUR_S = 3_600.0
SPEND_FRAC = 0.1
"""share of the balance one candidate may spend: smaller spreads a day's worth over more candidates, at lower levels"""


def balance_at(now_s: float, races: Iterable[tuple[float, float]], per_day: float) -> float:
    """Expected false promotions that may still be spent. races: (start time, level) of each, oldest first.

    Units: seconds of the wall clock; false promotions, 0 to `per_day`, which is what one day brings.
    """
    balance, since_s = per_day, None
    for time_s, level in [*races, (now_s, 0.0)]:
        if since_s is not None:
            balance = min(per_day, balance + per_day * max(0.0, time_s - since_s) / DAY_S)
        balance = max(0.0, balance - level)
        since_s = time_s if since_s is None else max(since_s, time_s)
    return balance


def candidate_alpha(now_s: float, races: Iterable[tuple[float, float]], gate: GateConfig) -> float:
    """Level of a candidate whose race begins now; 0.0 only where the budget was cut below what is already spent."""
    return min(gate.alpha, SPEND_FRAC * balance_at(now_s, races, gate.max_false_promotions_per_day))


def may_start(now_s: float, races: Sequence[tuple[float, float]], gate: GateConfig) -> bool:
    """False where the last hour has seen `max_candidates_per_hour` races begin, or no level is left."""
    num_recent = sum(now_s - HOUR_S < time_s <= now_s for time_s, _ in races)
    return num_recent < gate.max_candidates_per_hour and candidate_alpha(now_s, races, gate) > 0.0
