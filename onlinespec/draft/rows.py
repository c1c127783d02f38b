"""The rows a draft computes for a batch of samples, packed without padding.

Row p of a sample reads the captured hidden states of position p and the token at p + 1. Two kinds are
packed: context rows, of which only the key and value are needed, and query rows, from which the draft is
unrolled; every query row is a context row too. A position whose hidden states were not captured has no
row: it is absent from attention, and the others keep their true positions.

C context rows, N query rows, K draft steps, A captured layers, D model dim, V target vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from onlinespec.draft.sample import Sample


@dataclass(frozen=True)
class Rows:
    """Rows of several samples, sample after sample, positions ascending.

    Shapes: aux_CA [C, A*D]; embed_CD; position_C; query_N indexes into C; embed_NKD, the token each draft step
    reads; sizes, (context rows, query rows) of each sample. Hidden states and embeddings keep the dtype they came
    in, half as many bytes to a GPU; the draft widens them.
    """

    aux_CA: torch.Tensor
    embed_CD: torch.Tensor
    position_C: torch.Tensor
    query_N: torch.Tensor
    embed_NKD: torch.Tensor
    sizes: tuple[tuple[int, int], ...]

    @property
    def num_queries(self) -> int:
        return int(self.query_N.shape[0])


def build_rows(
    samples: Sequence[Sample], wanted: Sequence[torch.Tensor], embed_VD: torch.Tensor, num_steps: int
) -> Rows:
    """Pack the samples for an unroll of `num_steps` from the wanted positions.

    wanted: for each sample its query positions, ascending, each with hidden states and a next token. A
    sample that wants none is left out. Steps past the last token read the last token again; nobody may
    learn from or judge them.

    Shapes: wanted int64 [n]; embed_VD the target's embedding table.
    """
    aux, position, query, step_tokens, next_tokens, sizes = [], [], [], [], [], []
    num_context = 0
    steps_K = torch.arange(1, num_steps + 1)
    for sample, wanted_n in zip(samples, wanted, strict=True):
        if wanted_n.numel() == 0:
            continue
        # Attention is causal: context past the last query is never read.
        context_c = sample.has_aux_T[: int(wanted_n[-1]) + 1].nonzero().squeeze(1)
        aux.append(sample.aux_TA[context_c])
        position.append(context_c)
        query.append(torch.searchsorted(context_c, wanted_n) + num_context)
        next_tokens.append(sample.tokens_T[context_c + 1])
        step_tokens.append(sample.tokens_T[(wanted_n[:, None] + steps_K).clamp_max(sample.num_tokens - 1)])
        sizes.append((len(context_c), len(wanted_n)))
        num_context += len(context_c)
    if not sizes:
        raise ValueError("no sample wants a row")
    return Rows(
        aux_CA=torch.cat(aux),
        embed_CD=embed_VD[torch.cat(next_tokens)],
        position_C=torch.cat(position),
        query_N=torch.cat(query),
        embed_NKD=embed_VD[torch.cat(step_tokens)],
        sizes=tuple(sizes),
    )


def draft_positions(sample: Sample) -> torch.Tensor:
    """Positions the server can draft from: from the last prompt token on, with hidden states and a next token.

    The row of the last prompt token drafts what follows the first answer token, which the target sampled.

    Shapes: int64 [n], ascending.
    """
    first = max(sample.num_prompt_tokens - 1, 0)
    return sample.has_aux_T[first : sample.num_tokens - 1].nonzero().squeeze(1) + first
