"""What the draft should say: the target's distribution as the verifier uses it.

Where the verifier is greedy the teacher is the target's argmax; where it samples, the top-k logits at the
request's temperature with one bucket for all other tokens. Both are one form, a probability for each of k
ids and one for the tail, so batches may mix them. Top-p and top-k of the request are not applied.

M rows, k teacher top-k, W draft vocabulary, V target vocabulary.
"""

from dataclasses import dataclass

import torch

_TINY = 1e-30


@dataclass(frozen=True)
class Targets:
    """What each row should say.

    Shapes: ids_Mk draft ids, W standing for a token outside the draft's vocabulary; probs_Mk float32;
    tail_M float32, the mass of all tokens not among the ids; is_valid_M, False where the row has no loss;
    kept_M float32, the teacher's mass that the draft's vocabulary can speak, 1 where it is whole.
    has_outside: some id is W; known here, so that no device is asked for it.
    """

    ids_Mk: torch.Tensor
    probs_Mk: torch.Tensor
    tail_M: torch.Tensor
    is_valid_M: torch.Tensor
    kept_M: torch.Tensor
    has_outside: bool = False

    def part(self, rows: slice) -> "Targets":
        return Targets(
            self.ids_Mk[rows],
            self.probs_Mk[rows],
            self.tail_M[rows],
            self.is_valid_M[rows],
            self.kept_M[rows],
            self.has_outside,
        )


def build_targets(
    ids_Mk: torch.Tensor,
    logits_Mk: torch.Tensor,
    lse_M: torch.Tensor,
    temperature_M: torch.Tensor,
    draft_ids_V: torch.Tensor | None,
    hard_frac: float = 0.0,
) -> Targets:
    """Teacher logits to probabilities at the temperature the verifier used; 0 gives the argmax all mass.

    The tail's logits are not known, only their mass m at temperature 1. It is treated as m / exp(z_k)
    tokens that all have the k-th logit z_k: exact at T = 1, too much below, too little above, and nothing
    where the top k hold everything. (Where a grammar masked the k-th, z_k is the last finite one.) With a
    pruned vocabulary the ids outside it are dropped and the rest, tail included, is renormalised; a row that
    keeps nothing (greedy: whose argmax is outside) has no loss.

    hard_frac: share of the mass moved to the argmax whatever the temperature; 1 makes hard labels.

    Shapes: ids and logits [M, k], best first; draft_ids_V as `Draft.draft_ids`.
    """
    is_greedy_M = temperature_M <= 0
    inverse_M1 = torch.where(is_greedy_M, 1.0, 1.0 / temperature_M.clamp_min(_TINY))[:, None]
    mass_M = (1.0 - (logits_Mk - lse_M[:, None]).exp().sum(-1)).clamp(0.0, 1.0)
    # A grammar that allows fewer than k tokens leaves -inf logits behind them.
    last_M1 = logits_Mk.masked_fill(logits_Mk == -torch.inf, torch.inf).amin(-1, keepdim=True)
    tail_logit_M1 = (mass_M.clamp_min(_TINY).log() + lse_M)[:, None] - last_M1 + last_M1 * inverse_M1
    tail_logit_M1 = torch.where(mass_M[:, None] > 0, tail_logit_M1, -torch.inf)
    probs = torch.cat([logits_Mk * inverse_M1, tail_logit_M1], dim=-1).softmax(-1)
    hard = torch.zeros_like(probs)
    hard[:, 0] = 1.0
    probs = torch.where(is_greedy_M[:, None], hard, probs.lerp(hard, hard_frac))
    kept_M = torch.ones_like(lse_M)
    is_valid_M = torch.ones_like(is_greedy_M)
    has_outside = False
    if draft_ids_V is not None:
        ids_Mk = draft_ids_V[ids_Mk]
        is_outside = ids_Mk < 0
        has_outside = bool(is_outside.any())
        ids_Mk = torch.where(is_outside, int(draft_ids_V.max()) + 1, ids_Mk)
        probs[:, :-1].masked_fill_(is_outside, 0.0)
        kept_M = probs.sum(-1)
        is_valid_M = kept_M > 1e-6
        probs = probs / kept_M.clamp_min(1e-6)[:, None]
    return Targets(ids_Mk, probs[:, :-1], probs[:, -1], is_valid_M, kept_M, has_outside)
