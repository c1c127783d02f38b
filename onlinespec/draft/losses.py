"""What the draft learns: the target's distribution as the verifier uses it.

Where the verifier is greedy the teacher is its argmax; where it samples, the top-k logits at the request's
temperature with one bucket for all other tokens (forward KL). Both are one form, a probability for each
of k ids and one for the tail, so batches may mix them. Top-p and top-k of the request are not applied.

The loss and its gradient are computed chunk by chunk from what lm_head reads, so logits over the
vocabulary are alive for one chunk of rows only, and never twice.

N rows, k teacher top-k, D model dim, W draft vocabulary, V target vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

CHUNK_ROWS = 1024
_TINY = 1e-30
_OUTSIDE_LOGIT = -1e9


@dataclass(frozen=True)
class Targets:
    """What each row should say.

    Shapes: ids_Nk draft ids, W standing for a token outside the draft's vocabulary; probs_Nk float32;
    tail_N float32, the mass of all tokens not among the ids; is_valid_N, False where the row has no loss.
    """

    ids_Nk: torch.Tensor
    probs_Nk: torch.Tensor
    tail_N: torch.Tensor
    is_valid_N: torch.Tensor


def build_targets(
    ids_Nk: torch.Tensor,
    logits_Nk: torch.Tensor,
    lse_N: torch.Tensor,
    temperature_N: torch.Tensor,
    draft_ids_V: torch.Tensor | None,
) -> Targets:
    """Teacher logits to probabilities at the temperature the verifier used; 0 gives the argmax all mass.

    The tail's logits are not known, only their mass m at temperature 1. It is treated as m / exp(z_k)
    tokens that all have the k-th logit z_k: exact at T = 1, too much below, too little above, and nothing
    where the top k hold everything. With a pruned vocabulary the ids outside it are dropped and the rest,
    tail included, is renormalised; a row that keeps nothing (greedy: whose argmax is outside) has no loss.

    Shapes: ids and logits [N, k], best first; draft_ids_V as `Draft.draft_ids`.
    """
    is_greedy_N = temperature_N <= 0
    inverse_N1 = torch.where(is_greedy_N, 1.0, 1.0 / temperature_N.clamp_min(_TINY))[:, None]
    mass_N = (1.0 - (logits_Nk - lse_N[:, None]).exp().sum(-1)).clamp(0.0, 1.0)
    last_N1 = logits_Nk[:, -1:]
    tail_logit_N1 = (mass_N.clamp_min(_TINY).log() + lse_N)[:, None] - last_N1 + last_N1 * inverse_N1
    tail_logit_N1 = torch.where(mass_N[:, None] > 0, tail_logit_N1, -torch.inf)
    probs = torch.cat([logits_Nk * inverse_N1, tail_logit_N1], dim=-1).softmax(-1)
    hard = torch.zeros_like(probs)
    hard[:, 0] = 1.0
    probs = torch.where(is_greedy_N[:, None], hard, probs)
    is_valid_N = torch.ones_like(is_greedy_N)
    if draft_ids_V is not None:
        ids_Nk = draft_ids_V[ids_Nk]
        is_outside = ids_Nk < 0
        ids_Nk = torch.where(is_outside, int(draft_ids_V.max()) + 1, ids_Nk)
        probs[:, :-1].masked_fill_(is_outside, 0.0)
        kept_N1 = probs.sum(-1, keepdim=True)
        is_valid_N = kept_N1.squeeze(1) > 1e-6
        probs = probs / kept_N1.clamp_min(1e-6)
    return Targets(ids_Nk, probs[:, :-1], probs[:, -1], is_valid_N)


class _HeadLoss(torch.autograd.Function):
    """Weighted sum of KL(target || softmax(states @ head.T)); the gradient is made in the forward pass.

    d KL / d logit is p - q for the k ids and p (1 - q_tail / p_tail) for the others.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        states_ND: torch.Tensor,
        head_WD: torch.Tensor,
        targets: Targets,
        weight_N: torch.Tensor,
        is_pruned: bool,
    ) -> torch.Tensor:
        loss = states_ND.new_zeros(())
        grad_states, grad_head = torch.empty_like(states_ND), torch.zeros_like(head_WD)
        for begin in range(0, len(states_ND), CHUNK_ROWS):
            rows = slice(begin, begin + CHUNK_ROWS)
            ids, probs = targets.ids_Nk[rows], targets.probs_Nk[rows]
            tail, weight = targets.tail_N[rows, None], weight_N[rows, None]
            logits = states_ND[rows] @ head_WD.T
            if is_pruned:
                # One more column catches the ids outside the draft's vocabulary; its gradient is dropped.
                logits = F.pad(logits, (0, 1), value=_OUTSIDE_LOGIT)
            rest = logits.softmax(-1)
            top = rest.gather(1, ids)
            rest.scatter_(1, ids, 0.0)
            rest_sum = rest.sum(-1, keepdim=True).clamp_min(_TINY)
            entropy = (torch.xlogy(probs, probs)).sum(-1, keepdim=True) + torch.xlogy(tail, tail)
            cross = (probs * top.clamp_min(_TINY).log()).sum(-1, keepdim=True) + tail * rest_sum.log()
            loss += ((entropy - cross) * weight).sum()
            grad = rest.mul_((1.0 - tail / rest_sum) * weight)
            grad.scatter_(1, ids, (top - probs) * weight)
            grad = grad[:, : head_WD.shape[0]]
            grad_states[rows] = grad @ head_WD
            grad_head.addmm_(grad.T, states_ND[rows])
        ctx.save_for_backward(grad_states, grad_head)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: torch.Tensor):  # type: ignore[override]
        grad_states, grad_head = ctx.saved_tensors
        return grad_states * grad_loss, grad_head * grad_loss, None, None, None


def head_loss(states_ND: torch.Tensor, head_WD: torch.Tensor, targets: Targets, weight_N: torch.Tensor) -> torch.Tensor:
    """Sum over rows of weight times KL(target || draft), in nats; rows without loss count nothing.

    Shapes: states_ND as `Draft.states` gives them, flattened; head_WD lm_head's weight; scalar out.
    """
    is_pruned = bool((targets.ids_Nk >= head_WD.shape[0]).any())
    weight_N = weight_N * targets.is_valid_N
    return _HeadLoss.apply(states_ND, head_WD, targets, weight_N, is_pruned)
