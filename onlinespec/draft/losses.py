"""What the draft is trained to minimise, fused with lm_head.

Every loss here sees a row as k named tokens and one bucket for all others, the tail. Then d loss / d logit
is one value for each named token and, for every token of the tail, its own probability times one factor of
the row. So a loss is a function of [M, k] tensors (`_Part`), and only the head itself ever touches the
vocabulary. Loss and gradient are made chunk by chunk from what lm_head reads: logits over the vocabulary are
alive for one chunk of rows only, once, and never for a whole unroll.

M rows with a loss, k teacher top-k, K draft steps, D model dim, W draft vocabulary; n the chains of a chunk.
p is the draft's probability, t the teacher's; "named" are the teacher's k ids.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from onlinespec.draft.targets import Targets

CHUNK_ROWS = 1024
_TINY = 1e-30
_OUTSIDE_LOGIT = -1e9
_REVERSE_FLOOR = 1e-4


@dataclass(frozen=True)
class Terms:
    """Factor of each loss; see the functions of those names. kl and reverse_kl are per row, accept per chain."""

    kl: float = 1.0
    reverse_kl: float = 0.0
    accept: float = 0.0


KL_ONLY = Terms()


@dataclass(frozen=True)
class Chains:
    """Which rows belong to one unroll.

    Rows come chain after chain, steps ascending. Shapes: chain_M ascending from 0, step_M the draft step,
    emitted_M the draft id of the token the target emitted where the row's drafted token would stand, W where
    that is outside the draft's vocabulary or not known. host_M: chain_M on the CPU, where rows are cut into chunks.
    """

    chain_M: torch.Tensor
    step_M: torch.Tensor
    emitted_M: torch.Tensor
    num_steps: int
    host_M: np.ndarray

    @property
    def num_chains(self) -> int:
        return int(self.host_M[-1] - self.host_M[0]) + 1

    def part(self, rows: slice) -> "Chains":
        """Whole chains, numbered from 0 again."""
        chain_M, host_M = self.chain_M[rows] - int(self.host_M[rows.start]), self.host_M[rows]
        return Chains(chain_M, self.step_M[rows], self.emitted_M[rows], self.num_steps, host_M)


@dataclass
class _Part:
    """One loss of M rows. Shapes: loss_M; named_Mk, its gradient at the named logits; tail_M1, what a tail
    token's probability is multiplied with."""

    loss_M: torch.Tensor
    named_Mk: torch.Tensor
    tail_M1: torch.Tensor


def kl(p_Mk: torch.Tensor, rest_M1: torch.Tensor, t_Mk: torch.Tensor, tail_M1: torch.Tensor) -> _Part:
    """Forward KL, sum t log(t / p) over the named tokens and the tail: mean-seeking, the usual distillation.

    d/dz: p - t at the named, p (1 - t_tail / p_tail) in the tail.

    Source: Hinton, Vinyals, Dean 2015, arXiv 1503.02531; the tail is one more class.
    """
    entropy = torch.xlogy(t_Mk, t_Mk).sum(-1) + torch.xlogy(tail_M1, tail_M1).squeeze(1)
    cross = (t_Mk * p_Mk.clamp_min(_TINY).log()).sum(-1) + (tail_M1 * rest_M1.log()).squeeze(1)
    return _Part(entropy - cross, p_Mk - t_Mk, 1.0 - tail_M1 / rest_M1)


def reverse_kl(p_Mk: torch.Tensor, rest_M1: torch.Tensor, t_Mk: torch.Tensor, tail_M1: torch.Tensor) -> _Part:
    """Reverse KL, sum p log(p / t): mode-seeking. Teacher probabilities below 1e-4 count as 1e-4.

    With c = log(p / t) of a token's class and R the loss: d/dz = p (c - R).

    Source: Gu et al. 2024, MiniLLM, arXiv 2306.08543; here on k + 1 classes.
    """
    c_Mk = p_Mk.clamp_min(_TINY).log() - t_Mk.clamp_min(_REVERSE_FLOOR).log()
    c_M1 = rest_M1.log() - tail_M1.clamp_min(_REVERSE_FLOOR).log()
    loss_M1 = (p_Mk * c_Mk).sum(-1, keepdim=True) + rest_M1 * c_M1
    return _Part(loss_M1.squeeze(1), p_Mk * (c_Mk - loss_M1), c_M1 - loss_M1)


def accept(
    p_Mk: torch.Tensor, t_Mk: torch.Tensor, p_emitted_M: torch.Tensor, chains: Chains
) -> tuple[_Part, torch.Tensor]:
    """Expected share of draft steps that are not accepted: 1 - (sum over k of reach_k a_k) / K, by chain.

    SGLang with topk 1 accepts a drafted token if and only if the target emits it. For a draft that said
    token x with probability p(x), that is a_k = sum p(x) t(x) at step k; and step k is reached where all
    before it equal the emitted tokens, reach_k = product over j < k of p_j(emitted_j). The emitted tokens are
    drawn from t, so the sum estimates the drafted tokens accepted per verify step of a draft that samples; the
    served draft takes its argmax, which this relaxes. Tail tokens count nothing in a_k, so it is a little low.
    t is the teacher over the whole vocabulary: what a pruned draft cannot say counts as not accepted.

    Returns the part without what comes through p_emitted, and d loss / d p_emitted [M].

    Source: SGLang 0.5.23 speculative/eagle_utils.py, default verification; the form with sum(p t) for a
    sampling verifier: LK losses, arXiv 2602.23881.
    """
    accepted_M = (p_Mk * t_Mk).sum(-1)
    place = (chains.chain_M, chains.step_M)
    dense = accepted_M.new_zeros(2, chains.num_chains, chains.num_steps)
    dense[0].index_put_(place, accepted_M)
    dense[1].index_put_(place, p_emitted_M)
    with torch.enable_grad():
        dense.requires_grad_()
        reach = torch.cat([dense.new_ones(chains.num_chains, 1), dense[1, :, :-1]], dim=1).cumprod(1)
        expected = (reach * dense[0]).sum() / chains.num_steps
        (grad,) = torch.autograd.grad(expected, dense)
    loss_M = -(reach * dense[0]).detach()[place] / chains.num_steps
    loss_M = loss_M + (chains.step_M == 0)
    scale_M1 = -grad[0][place][:, None]
    part = _Part(loss_M, scale_M1 * p_Mk * (t_Mk - accepted_M[:, None]), -scale_M1 * accepted_M[:, None])
    return part, -grad[1][place]


def head_loss(
    states_MD: torch.Tensor,
    head_WD: torch.Tensor,
    targets: Targets,
    weight_M: torch.Tensor,
    terms: Terms = KL_ONLY,
    chains: Chains | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss in nats (accept: a share), and whether each row's most likely token is the emitted one.

    kl and reverse_kl are weighted by row with weight_M; rows that are not valid count nothing. accept counts
    each chain once; it wants `chains`, and so do the matches, which are all False without them.

    Shapes: states_MD as `Draft.states` gives them, flattened, in the dtype the head is to be multiplied in;
    head_WD lm_head's weight; scalar and bool [M] out.
    """
    return _HeadLoss.apply(states_MD, head_WD, targets, weight_M * targets.is_valid_M, terms, chains)


class _HeadLoss(torch.autograd.Function):
    """The gradient is made in the forward pass; backward only hands it on."""

    @staticmethod
    def forward(ctx, states_MD, head_WD, targets, weight_M, terms, chains):  # type: ignore[override]
        num_rows, num_words = len(states_MD), len(head_WD)
        head = head_WD.to(states_MD.dtype)
        loss = states_MD.new_zeros((), dtype=torch.promote_types(states_MD.dtype, torch.float32))
        grad_states = torch.empty_like(states_MD)
        grad_head = torch.zeros_like(head_WD) if ctx.needs_input_grad[1] else None
        is_match_M = torch.zeros(num_rows, dtype=torch.bool, device=states_MD.device)
        for rows in _chunks(num_rows, chains):
            logits = (states_MD[rows] @ head.T).to(loss.dtype)
            part_chains = None if chains is None else chains.part(rows)
            if part_chains is not None:
                is_match_M[rows] = logits.argmax(-1) == part_chains.emitted_M
            if targets.has_outside:
                # One more column catches the ids outside the draft's vocabulary; its gradient is dropped.
                logits = F.pad(logits, (0, 1), value=_OUTSIDE_LOGIT)
            part, grad = _chunk_gradient(logits, targets.part(rows), weight_M[rows], terms, part_chains)
            loss += part
            grad = grad[:, :num_words].to(states_MD.dtype)
            grad_states[rows] = grad @ head
            if grad_head is not None and grad.dtype == grad_head.dtype:
                grad_head.addmm_(grad.T, states_MD[rows])
            elif grad_head is not None:
                grad_head += grad.T @ states_MD[rows]
        ctx.save_for_backward(grad_states, *([] if grad_head is None else [grad_head]))
        ctx.mark_non_differentiable(is_match_M)
        return loss, is_match_M

    @staticmethod
    def backward(ctx, grad_loss: torch.Tensor, _grad_match: torch.Tensor):  # type: ignore[override]
        grad_states, *grad_head = ctx.saved_tensors
        return grad_states * grad_loss, grad_head[0] * grad_loss if grad_head else None, None, None, None, None


def _chunks(num_rows: int, chains: Chains | None) -> Iterator[slice]:
    """About CHUNK_ROWS rows each; a chain is never cut."""
    begin = 0
    while begin < num_rows:
        end = begin + CHUNK_ROWS
        if chains is not None and end < num_rows:
            end = int(np.searchsorted(chains.host_M, chains.host_M[end]))
        yield slice(begin, min(end, num_rows))
        begin = end


def _chunk_gradient(
    logits: torch.Tensor, targets: Targets, weight_M: torch.Tensor, terms: Terms, chains: Chains | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and d loss / d logits of one chunk. Shapes: logits [M, W] to scalar and [M, W]."""
    rest = logits.softmax(-1)
    ids, t_Mk, t_tail_M1 = targets.ids_Mk, targets.probs_Mk, targets.tail_M[:, None]
    p_Mk = rest.gather(1, ids)
    if terms.accept:
        assert chains is not None, "the accept term wants chains"
        is_known_M = chains.emitted_M < logits.shape[1]
        emitted_M1 = torch.where(is_known_M, chains.emitted_M, 0)[:, None]
        p_emitted_M = rest.gather(1, emitted_M1).squeeze(1) * is_known_M
    rest.scatter_(1, ids, 0.0)
    rest_M1 = rest.sum(-1, keepdim=True).clamp_min(_TINY)
    loss, named_Mk, tail_M1 = logits.new_zeros(()), torch.zeros_like(p_Mk), torch.zeros_like(rest_M1)
    for share, formula in ((terms.kl, kl), (terms.reverse_kl, reverse_kl)):
        if share:
            part = formula(p_Mk, rest_M1, t_Mk, t_tail_M1)
            weight_M1 = share * weight_M[:, None]
            loss += (part.loss_M * weight_M1.squeeze(1)).sum()
            named_Mk += part.named_Mk * weight_M1
            tail_M1 += part.tail_M1 * weight_M1
    if not terms.accept or chains is None:
        return loss, rest.mul_(tail_M1).scatter_(1, ids, named_Mk)
    part, grad_emitted_M = accept(p_Mk, t_Mk * targets.kept_M[:, None], p_emitted_M, chains)
    # d p_x / d z_j is p_x ((j is x) - p_j): a tail factor for every token, and one more term at x itself.
    own_M1 = (terms.accept * grad_emitted_M * p_emitted_M)[:, None]
    loss += terms.accept * part.loss_M.sum()
    named_Mk += terms.accept * part.named_Mk - own_M1 * p_Mk
    tail_M1 += terms.accept * part.tail_M1 - own_M1
    return loss, rest.mul_(tail_M1).scatter_(1, ids, named_Mk).scatter_add_(1, emitted_M1, own_M1)
