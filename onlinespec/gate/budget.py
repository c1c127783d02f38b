"""What error each candidate may spend, so that a long life of candidates does not promote by luck.

e-LOND: candidate t (from 1) is tested at alpha_t = alpha * gamma_t * (promotions before it + 1), where the
gammas sum to 1, and is promoted where its e-value reaches 1 / alpha_t.

What is controlled is the false discovery *rate*: among all promotions of a run directory's life, the
expected share of candidates that were not better by more than min_gain is at most alpha, after any number
of candidates and whatever the dependence between them. It is not the chance of any false promotion at all
(FWER): of 40 promotions at alpha 0.05, two may be no improvement.

gamma_t = 5 / ((t + 4) * (t + 5)) telescopes to a sum of exactly 1. It is flat over the 10 to 30
candidates of a short run (0.167, 0.024 and 0.004 at t = 1, 10 and 30; 6 / (pi t)^2 has 0.61, 0.006 and
0.0007), and promotions buy level back: where every candidate wins, alpha_t stays above alpha / 8 for the
first 30, and where half of them win, above alpha / 16. Far out it costs power slowly: where a fixed share of
the candidates wins, alpha_t falls as 1 / t, which asks 2.3 more nats of evidence per tenfold life.

A candidate counts from the start of its race. A race lost to a crash has spent its level.

Source: Xu and Ramdas, "Online multiple testing with e-values", AISTATS 2024, section 3 (e-LOND).
"""

GAMMA_SPREAD = 5


def gamma(candidate: int) -> float:
    """Share of the budget for candidate number `candidate`, counted from 1; the shares sum to 1."""
    assert candidate >= 1, candidate
    return GAMMA_SPREAD / ((candidate + GAMMA_SPREAD - 1) * (candidate + GAMMA_SPREAD))


def candidate_alpha(alpha: float, num_candidates_before: int, num_promotions_before: int) -> float:
    """Level of the next candidate's test.

    Counts are of this run directory's life, restarts included. Promotions are those the gate decided;
    counting fewer than there were is safe, counting more is not.
    """
    assert 0 <= num_promotions_before <= num_candidates_before, (num_promotions_before, num_candidates_before)
    return alpha * gamma(num_candidates_before + 1) * (num_promotions_before + 1)
