"""What a race ends with: the decision and every number it rests on. JSON-able, stored with the version."""

from collections.abc import Collection
from typing import Literal

import msgspec


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The gate's judgement of one candidate.

    Units: gains and accept lengths in tokens per verify step, times in wall clock seconds.
    """

    decision: Literal["promote", "drop"]
    reason: str
    candidate_id: str
    incumbent_id: str
    num_requests: int
    """held-out requests compared, each of another conversation"""
    mean_gain_tokens: float
    """mean over requests of candidate minus incumbent; this and the accept lengths are 0 without a request"""
    interval_tokens: tuple[float, float]
    """95 % normal approximation around it, descriptive only: the race stopped when it looked good"""
    e_value: float
    """the evidence: valid at whatever moment the race stopped"""
    threshold: float
    """e-value a promotion needs, 1 / alpha"""
    alpha: float
    """level this candidate was tested at"""
    accept_length_incumbent: float
    """sum of tokens over sum of steps; long answers weigh more than in the mean gain"""
    accept_length_candidate: float
    num_dropped_early: int
    """requests refused for having begun before the candidate was frozen"""
    num_dropped_duplicates: int
    """requests refused for belonging to a conversation of this race"""
    num_dropped_trained: int
    """requests refused for an answer that training has seen"""
    num_dropped_empty: int
    """requests without a verify step: nothing to compare"""
    num_missing_context: int
    """of num_requests, those walked without some prompt rows: equal for both drafts, not exactly the live figure"""
    frozen_at_s: float
    decided_at_s: float


def barred_reason(candidate_digest: str, barred: Collection[str]) -> str | None:
    """Say why weights must not be promoted; None where nothing bars them.

    Weights that were rolled back stay barred whatever a later race says of them.
    """
    if candidate_digest not in barred:
        return None
    return f"weights {candidate_digest[:12]} were rolled back; only `rollback --to` serves them again"
