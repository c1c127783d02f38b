"""Samples to what one forward pass needs: the rows to unroll and what each should say.

Draft row p, step k learns the target's distribution after x_{p+1+k}; it has a loss where that token is
committed, its teacher was captured, and row p has hidden states. Rows that have no loss at any step are
not computed.

N query rows, K draft steps, M rows with a loss over all steps, V target vocabulary, k teacher top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from onlinespec.draft.losses import Targets, build_targets
from onlinespec.draft.rows import Rows, build_rows, draft_positions
from onlinespec.draft.sample import Sample


@dataclass(frozen=True)
class Batch:
    """Shapes: kept_M indexes the flattened [K * N] states; step_M the draft step of each; targets of M rows."""

    rows: Rows
    kept_M: torch.Tensor
    step_M: torch.Tensor
    targets: Targets

    def num_rows_per_step(self, num_steps: int) -> torch.Tensor:
        """Rows with a loss at each draft step. Shapes: [K]."""
        return torch.bincount(self.step_M[self.targets.is_valid_N], minlength=num_steps)


def build_batch(
    samples: Sequence[Sample], embed_VD: torch.Tensor, num_steps: int, draft_ids_V: torch.Tensor | None
) -> Batch | None:
    """Pack samples of any lengths; None where they hold nothing to learn."""
    steps_K1 = torch.arange(1, num_steps + 1)[:, None]
    wanted, has_loss, ids, logits, lse, temperature = [], [], [], [], [], []
    for sample in samples:
        positions_n = draft_positions(sample)
        teacher_Kn = positions_n + steps_K1
        has_loss_Kn = teacher_Kn < sample.num_tokens
        teacher_Kn = teacher_Kn.clamp_max(sample.num_tokens - 1)
        has_loss_Kn &= sample.has_teacher_T[teacher_Kn]
        used_n = has_loss_Kn.any(0)
        teacher_Kn = teacher_Kn[:, used_n]
        wanted.append(positions_n[used_n])
        has_loss.append(has_loss_Kn[:, used_n])
        ids.append(sample.teacher_ids_Tk[teacher_Kn])
        logits.append(sample.teacher_logits_Tk[teacher_Kn])
        lse.append(sample.teacher_lse_T[teacher_Kn])
        temperature.append(torch.full(teacher_Kn.shape, sample.temperature))
    has_loss_KN = torch.cat(has_loss, dim=1)
    if not bool(has_loss_KN.any()):
        return None
    kept_M = has_loss_KN.flatten().nonzero().squeeze(1)

    def kept(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts, dim=1).flatten(0, 1)[kept_M]

    return Batch(
        rows=build_rows(samples, wanted, embed_VD, num_steps),
        kept_M=kept_M,
        step_M=kept_M // has_loss_KN.shape[1],
        targets=build_targets(kept(ids), kept(logits), kept(lse), kept(temperature), draft_ids_V),
    )
