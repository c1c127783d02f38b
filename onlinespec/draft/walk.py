"""What a draft would have had accepted on a request that was served with another: exact with topk = 1.

A drafted token counts if and only if it equals the token the target emitted, at any temperature, and while
all before it matched the draft's inputs are the emitted tokens. So the teacher-forced unroll over the
captured rows is what the draft would have said, and walking from verify step to verify step, L tokens at a
time, gives what the server would have counted. Exact where the sample is complete
(`Sample.is_complete`); prompt rows that are missing are missing from every draft's context alike.

R draft rows, K draft steps, V target vocabulary.
"""

from collections.abc import Sequence

import torch

from onlinespec.draft.model import Draft
from onlinespec.draft.place import placed
from onlinespec.draft.rows import build_rows, draft_positions
from onlinespec.draft.sample import Sample, VerifySteps

MAX_ROWS = 512
"""of one unroll: its scores and logits, a long answer's over a long prompt, are what a walk takes of a GPU's memory"""
MAX_SCORES = 2**28
"""of one draft step, over all heads: a gigabyte in float32, so fewer rows at once behind a very long prompt"""


@torch.no_grad()
def matches_each(drafts: Sequence[Draft], sample: Sample, embed_VD: torch.Tensor, num_steps: int) -> list[torch.Tensor]:
    """Whether each draft's tokens equal the emitted ones. Rows are built once for all drafts, so many at a time.

    Row r is the verify step that starts at position num_prompt_tokens + r, up to the last token; column k is
    drafted token k + 1. False where the sample has ended or the row was not captured.

    Shapes: one bool [R, K] per draft, R the number of answer tokens.
    """
    results = [torch.zeros(sample.num_answer_tokens, num_steps, dtype=torch.bool) for _ in drafts]
    all_positions = draft_positions(sample)
    if not drafts or not all_positions.numel():
        return results
    num_heads = max(draft.config.num_heads for draft in drafts)
    for positions_N in all_positions.split(max(1, min(MAX_ROWS, MAX_SCORES // (num_heads * sample.num_tokens)))):
        rows = placed(build_rows([sample], [positions_N], embed_VD, num_steps), drafts[0].device)
        emitted_NK = positions_N[:, None] + torch.arange(2, num_steps + 2)
        is_emitted_NK = emitted_NK < sample.num_tokens
        tokens_NK = sample.tokens_T[emitted_NK.clamp_max(sample.num_tokens - 1)]
        for draft, found_RK in zip(drafts, results, strict=True):
            drafted_NK = draft.unroll(rows).argmax(-1).T.cpu()
            if draft.target_ids_W is not None:
                drafted_NK = draft.target_ids_W[drafted_NK]
            found_RK[positions_N + 1 - sample.num_prompt_tokens] = (drafted_NK == tokens_NK) & is_emitted_NK
    return results


def matches(draft: Draft, sample: Sample, embed_VD: torch.Tensor, num_steps: int) -> torch.Tensor:
    """`matches_each` for one draft. Shapes: bool [R, K]."""
    return matches_each([draft], sample, embed_VD, num_steps)[0]


def accept_walk(matches_RK: torch.Tensor, start: int, end: int, num_steps: int) -> VerifySteps:
    """Verify steps the server would have taken from the first bonus token to the last committed token.

    start: position of the first answer token (row 0). end: position of the last committed token. The draft
    may match past it, which no sample can tell: correct tokens are those up to `end`, where the live server
    counts a whole accepted run, so hold `min(num_correct, end - start)` of the last live step against it.

    Shapes: matches_RK as `matches` gives it, at least `num_steps` wide.
    """
    leading = matches_RK[:, :num_steps].long().cumprod(1).sum(1).tolist()
    steps = VerifySteps()
    position = start
    while position < end:
        num_correct = min(leading[position - start], end - position)
        num_committed = min(1 + num_correct, end - position)
        steps.start.append(position)
        steps.num_drafted.append(num_steps)
        steps.num_correct.append(num_correct)
        steps.num_committed.append(num_committed)
        steps.version.append(0)
        steps.is_mixed.append(False)
        position += num_committed
    return steps


def accept_length(steps: VerifySteps) -> float:
    """Tokens committed per verify step, the bonus token counted. NaN without a step."""
    return sum(steps.num_committed) / len(steps) if len(steps) else float("nan")


def walk(draft: Draft, sample: Sample, embed_VD: torch.Tensor, num_steps: int) -> VerifySteps:
    """`accept_walk` of a whole request."""
    matches_RK = matches(draft, sample, embed_VD, num_steps)
    return accept_walk(matches_RK, sample.num_prompt_tokens, sample.num_tokens - 1, num_steps)
