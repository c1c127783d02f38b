"""Samples to what one forward pass needs: the rows to unroll and what each should say.

Draft row p, step k learns the target's distribution after x_{p+1+k}; it has a loss where that token is
committed, its teacher was captured, and row p has hidden states. The first rejected position of a verify
step is among them: its teacher came with the last committed row. Rows that have no loss at any step are not
computed.

N query rows, K draft steps, M rows with a loss over all steps, V target vocabulary, k teacher top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from onlinespec.draft.losses import Chains
from onlinespec.draft.rows import Rows, build_rows, draft_positions
from onlinespec.draft.sample import Sample
from onlinespec.draft.targets import Targets, build_targets


@dataclass(frozen=True)
class Batch:
    """Shapes: kept_M indexes the flattened [K * N] states, row after row of one query; targets of M rows."""

    rows: Rows
    kept_M: torch.Tensor
    chains: Chains
    targets: Targets

    def num_rows_per_step(self) -> torch.Tensor:
        """Rows with a loss at each draft step. Shapes: [K]."""
        return torch.bincount(self.chains.step_M[self.targets.is_valid_M], minlength=self.chains.num_steps)


def build_batch(
    samples: Sequence[Sample],
    embed_VD: torch.Tensor,
    num_steps: int,
    draft_ids_V: torch.Tensor | None,
    hard_frac: float = 0.0,
) -> Batch | None:
    """Pack samples of any lengths; None where they hold nothing to learn. hard_frac: see `build_targets`."""
    steps_K = torch.arange(1, num_steps + 1)
    wanted, has_loss, ids, logits, lse, temperature, emitted = [], [], [], [], [], [], []
    for sample in samples:
        positions_n = draft_positions(sample)
        teacher_nK = positions_n[:, None] + steps_K
        has_loss_nK = teacher_nK < sample.num_tokens
        teacher_nK = teacher_nK.clamp_max(sample.num_tokens - 1)
        has_loss_nK &= sample.has_teacher_T[teacher_nK]
        used_n = has_loss_nK.any(1)
        wanted.append(positions_n[used_n])
        has_loss.append(has_loss_nK[used_n])
        teacher_m = teacher_nK[has_loss_nK]
        ids.append(sample.teacher_ids_Tk[teacher_m])
        logits.append(sample.teacher_logits_Tk[teacher_m])
        lse.append(sample.teacher_lse_T[teacher_m])
        temperature.append(torch.full(teacher_m.shape, sample.temperature))
        next_m = sample.tokens_T[(teacher_m + 1).clamp_max(sample.num_tokens - 1)]
        emitted.append(torch.where(teacher_m + 1 < sample.num_tokens, next_m, -1))
    has_loss_NK = torch.cat(has_loss)
    if not bool(has_loss_NK.any()):
        return None
    chain_M, step_M = has_loss_NK.nonzero().unbind(1)
    return Batch(
        rows=build_rows(samples, wanted, embed_VD, num_steps),
        kept_M=step_M * len(has_loss_NK) + chain_M,
        chains=Chains(
            chain_M, step_M, _draft_ids(torch.cat(emitted), len(embed_VD), draft_ids_V), num_steps, chain_M.numpy()
        ),
        targets=build_targets(
            torch.cat(ids), torch.cat(logits), torch.cat(lse), torch.cat(temperature), draft_ids_V, hard_frac
        ),
    )


def _draft_ids(tokens_M: torch.Tensor, vocab_size: int, draft_ids_V: torch.Tensor | None) -> torch.Tensor:
    """The draft's ids of target tokens, W where it has none; -1 stands for no token."""
    if draft_ids_V is None:
        return torch.where(tokens_M < 0, vocab_size, tokens_M)
    draft_M = torch.where(tokens_M < 0, -1, draft_ids_V[tokens_M.clamp_min(0)])
    return torch.where(draft_M < 0, int(draft_ids_V.max()) + 1, draft_M)
