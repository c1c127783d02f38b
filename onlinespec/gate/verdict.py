"""What a race ends with: the decision and every number it rests on. JSON-able, stored with the version."""

from collections.abc import Collection
from typing import Literal, get_args

import msgspec

Fidelity = Literal["complete", "completed", "missing_context", "swap_inside"]
"""How exactly a request's shadow walks tell what the server would have counted.

complete: every row was captured, under one version: to the integer. completed: the same, with prompt rows from the
prefix cache. missing_context: some prompt rows lack, for both drafts alike. swap_inside: the draft changed while it
ran, so that no single draft's walk is the live figure; it outranks the others.
"""
FIDELITIES: tuple[Fidelity, ...] = get_args(Fidelity)


def fidelity_of(*, has_swap: bool, is_complete: bool, num_completed_rows: int) -> Fidelity:
    """The class of a request; each has exactly one."""
    if has_swap:
        return "swap_inside"
    if not is_complete:
        return "missing_context"
    return "completed" if num_completed_rows else "complete"


class Walked(msgspec.Struct, frozen=True):
    """What one draft's accept walk over one request, or over many, comes to.

    Shapes: reached and matched one entry per draft position: steps whose token there was checked, all before it
    matched; and of them, those that matched too.
    """

    tokens: int = 0
    """committed, the bonus tokens counted"""
    steps: int = 0
    reached: tuple[int, ...] = ()
    matched: tuple[int, ...] = ()

    @property
    def accept_length(self) -> float:
        """Tokens per verify step; 0.0 without one."""
        return self.tokens / max(self.steps, 1)

    def __add__(self, other: "Walked") -> "Walked":
        return Walked(
            self.tokens + other.tokens,
            self.steps + other.steps,
            _sums(self.reached, other.reached),
            _sums(self.matched, other.matched),
        )


def _sums(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    """By position; a walk without counts adds none."""
    if not left or not right:
        return left or right
    return tuple(a + b for a, b in zip(left, right, strict=True))


class SliceResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a race says of one slice."""

    dimension: str
    label: str
    """(rest) for all that was too small when it came"""
    num_requests: int
    mean_gain_tokens: float
    incumbent: Walked
    candidate: Walked
    e_proof: float
    """evidence that the slice loses less than the tolerance"""
    e_harm: float
    """evidence that it loses more"""
    harm_threshold: float
    is_required: bool
    """the slice holds enough of the race that no promotion goes without its proof"""
    is_proven: bool


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
    span_s: float
    """between the first and the last start of these"""
    mean_gain_tokens: float
    """mean over requests of candidate minus incumbent; this and the accept lengths are 0 without a request"""
    interval_tokens: tuple[float, float]
    """95 % normal approximation around it, descriptive only: the race stopped when it looked good"""
    test: str
    """e-process the evidence comes from"""
    e_value: float
    """the evidence: valid at whatever moment the race stopped"""
    threshold: float
    """e-value a promotion needs, 1 / alpha"""
    alpha: float
    """level this candidate was tested at"""
    accept_length_incumbent: float
    """sum of tokens over sum of steps; long answers weigh more than in the mean gain"""
    accept_length_candidate: float
    incumbent: Walked
    """sums over the requests compared, per draft position too"""
    candidate: Walked
    slices: tuple[SliceResult, ...]
    """largest first"""
    fidelity: dict[Fidelity, int]
    """of num_requests, how many are of each class"""
    num_dropped_early: int
    """requests refused for having begun before the candidate was frozen"""
    num_dropped_duplicates: int
    """requests refused for belonging to a conversation of this race"""
    num_dropped_trained: int
    """requests refused for an answer that training has seen"""
    num_dropped_empty: int
    """requests without a verify step: nothing to compare"""
    frozen_at_s: float
    decided_at_s: float


def barred_reason(candidate_digest: str, barred: Collection[str]) -> str | None:
    """Say why weights must not be promoted; None where nothing bars them.

    Weights that were rolled back stay barred whatever a later race says of them.
    """
    if candidate_digest not in barred:
        return None
    return f"weights {candidate_digest[:12]} were rolled back; only `rollback --to` serves them again"
