"""One request as the trainer and the gate see it: committed tokens and the features captured with them.

Shapes: T tokens of the request (prompt, then answer), A captured layers, D target width, k teacher top-k,
N verify steps.
"""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class VerifySteps:
    """What the live server counted, one entry per verify step, in order.

    start: position of the bonus token the step began with. num_correct: drafted tokens accepted, not
    truncated by a stop. num_committed: tokens the step made visible, bonus included (truncated by a stop).
    version: draft that drafted it. is_mixed: first verify after a swap, whose first drafted token is the
    old draft's.
    """

    start: list[int] = field(default_factory=list)
    num_drafted: list[int] = field(default_factory=list)
    num_correct: list[int] = field(default_factory=list)
    num_committed: list[int] = field(default_factory=list)
    version: list[int] = field(default_factory=list)
    is_mixed: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.start)


@dataclass(frozen=True)
class Sample:
    """A finished request.

    Shapes: tokens_T int64; aux_TA [T, A*D] as the server sent it, float32 or bfloat16, zeros where has_aux_T is
    False; teacher_ids_Tk int64 and
    teacher_logits_Tk float32 [T, k], teacher_lse_T float32: the target's distribution for position t + 1,
    valid where has_teacher_T. The last token usually has no row.
    """

    request: int
    tenant: str
    num_prompt_tokens: int
    temperature: float
    """effective for verification; 0 means greedy"""
    tokens_T: torch.Tensor
    aux_TA: torch.Tensor
    has_aux_T: torch.Tensor
    teacher_ids_Tk: torch.Tensor
    teacher_logits_Tk: torch.Tensor
    teacher_lse_T: torch.Tensor
    has_teacher_T: torch.Tensor
    verify: VerifySteps
    finish_reason: str
    started_s: float
    """wall clock of the server when the request's first rows came"""
    ended_s: float
    num_completed_rows: int = 0
    """of has_aux_T, rows that the server's prefix cache kept from the tap and an earlier request had"""
    group: bytes = b""
    """keyed hash of tenant and first user message; one conversation and its repeats share it"""

    @property
    def num_tokens(self) -> int:
        return int(self.tokens_T.shape[0])

    @property
    def num_answer_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))

    @property
    def is_complete(self) -> bool:
        """Every position but the last has its row: the accept walk is exact."""
        return bool(self.has_aux_T[: self.num_tokens - 1].all())

    @property
    def has_swap(self) -> bool:
        """More than one draft drafted for it."""
        return len(set(self.verify.version)) > 1 or any(self.verify.is_mixed)

    @property
    def missing_prompt_frac(self) -> float:
        """Share of prompt positions without a row; 1.0 where a row that the walk drafts from is missing."""
        first = max(0, self.num_prompt_tokens - 1)
        if not bool(self.has_aux_T[first : self.num_tokens - 1].all()):
            return 1.0
        return float((~self.has_aux_T[: self.num_prompt_tokens]).float().mean())

    @property
    def answer_key(self) -> tuple[int, ...]:
        return tuple(self.tokens_T[self.num_prompt_tokens :].tolist())
