"""Samples as the bytes of one safetensors file, and back, exactly.

Rows of all samples stand one after another; only rows that were captured are stored. Hidden states are stored as
bfloat16 where that loses nothing, which is so whenever the server runs in bfloat16.

T tokens, R rows with hidden states, M rows with a teacher, of all samples of a shard; A captured layers, D target
width, k teacher top-k.
"""

from collections.abc import Sequence

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from onlinespec.draft.sample import Sample, VerifySteps
from onlinespec.errors import RecordError

HEADER_BYTES = 4096
"""more than a shard's own header takes"""
_PER_TOKEN = ("tokens_T", "has_aux_T", "has_teacher_T")
_PER_TEACHER_ROW = ("teacher_ids_Mk", "teacher_logits_Mk", "teacher_lse_M")
_TENSORS = {"samples_json", "aux_RA", *_PER_TOKEN, *_PER_TEACHER_ROW}


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    """What of a sample is no tensor."""

    request: int
    tenant: str
    num_tokens: int
    num_prompt_tokens: int
    temperature: float
    finish_reason: str
    started_s: float
    ended_s: float
    group: bytes
    verify: VerifySteps


def _line(sample: Sample) -> _Line:
    return _Line(
        request=sample.request,
        tenant=sample.tenant,
        num_tokens=sample.num_tokens,
        num_prompt_tokens=sample.num_prompt_tokens,
        temperature=sample.temperature,
        finish_reason=sample.finish_reason,
        started_s=sample.started_s,
        ended_s=sample.ended_s,
        group=sample.group,
        verify=sample.verify,
    )


def sample_bytes(sample: Sample) -> int:
    """Upper bound of what one sample adds to a shard."""
    num_rows, num_teacher = int(sample.has_aux_T.sum()), int(sample.has_teacher_T.sum())
    row_bytes, teacher_bytes = 4 * sample.aux_TA.shape[1], 8 * sample.teacher_ids_Tk.shape[1] + 4
    line_bytes = len(msgspec.json.encode(_line(sample))) + 2
    return 6 * sample.num_tokens + row_bytes * num_rows + teacher_bytes * num_teacher + line_bytes


def encode(samples: Sequence[Sample]) -> bytes:
    """One file's bytes. The samples must agree in A*D and k."""
    aux_RA = torch.cat([sample.aux_TA[sample.has_aux_T] for sample in samples])
    rounded_RA = aux_RA.bfloat16()
    taught = [(sample, sample.has_teacher_T) for sample in samples]
    lines = msgspec.json.encode([_line(sample) for sample in samples])
    tensors = {
        "samples_json": torch.frombuffer(bytearray(lines), dtype=torch.uint8),
        "tokens_T": torch.cat([sample.tokens_T for sample in samples]).int(),
        "has_aux_T": torch.cat([sample.has_aux_T for sample in samples]),
        "has_teacher_T": torch.cat([sample.has_teacher_T for sample in samples]),
        "aux_RA": rounded_RA if torch.equal(rounded_RA.float(), aux_RA.float()) else aux_RA.float(),
        "teacher_ids_Mk": torch.cat([sample.teacher_ids_Tk[has_T] for sample, has_T in taught]).int(),
        "teacher_logits_Mk": torch.cat([sample.teacher_logits_Tk[has_T] for sample, has_T in taught]),
        "teacher_lse_M": torch.cat([sample.teacher_lse_T[has_T] for sample, has_T in taught]),
    }
    return save(tensors)


def decode(data: bytes, name: str) -> list[Sample]:
    """The samples of one file, in order; what was not captured is zero. `name` is for errors.

    Raises: RecordError where the bytes are no shard, or its tensors do not agree with each other.
    """
    try:
        tensors = load(data)
        lines = msgspec.json.decode(bytes(tensors["samples_json"].numpy()), type=list[_Line])
    except (SafetensorError, msgspec.MsgspecError, KeyError) as error:
        raise RecordError(f"{name}: not a shard of a recording ({error}); record again") from error
    _check_sizes(tensors, lines, name)
    has_aux_T, has_teacher_T = tensors["has_aux_T"], tensors["has_teacher_T"]
    aux_TA = _spread(tensors["aux_RA"].float(), has_aux_T)
    ids_Tk = _spread(tensors["teacher_ids_Mk"].long(), has_teacher_T)
    logits_Tk = _spread(tensors["teacher_logits_Mk"], has_teacher_T)
    lse_T = _spread(tensors["teacher_lse_M"], has_teacher_T)
    tokens_T = tensors["tokens_T"].long()
    samples, start = [], 0
    for line in lines:
        span = slice(start, start + line.num_tokens)
        start = span.stop
        samples.append(
            Sample(
                request=line.request,
                tenant=line.tenant,
                num_prompt_tokens=line.num_prompt_tokens,
                temperature=line.temperature,
                # Copies: a sample that is kept must not keep its whole shard.
                tokens_T=tokens_T[span].clone(),
                aux_TA=aux_TA[span].clone(),
                has_aux_T=has_aux_T[span].clone(),
                teacher_ids_Tk=ids_Tk[span].clone(),
                teacher_logits_Tk=logits_Tk[span].clone(),
                teacher_lse_T=lse_T[span].clone(),
                has_teacher_T=has_teacher_T[span].clone(),
                verify=line.verify,
                finish_reason=line.finish_reason,
                started_s=line.started_s,
                ended_s=line.ended_s,
                group=line.group,
            )
        )
    return samples


def _check_sizes(tensors: dict[str, torch.Tensor], lines: list[_Line], name: str) -> None:
    if set(tensors) != _TENSORS:
        raise RecordError(f"{name}: holds the tensors {sorted(tensors)}, wanted {sorted(_TENSORS)}; record again")
    wanted = dict.fromkeys(_PER_TOKEN, sum(line.num_tokens for line in lines))
    wanted |= dict.fromkeys(_PER_TEACHER_ROW, int(tensors["has_teacher_T"].sum()))
    wanted["aux_RA"] = int(tensors["has_aux_T"].sum())
    for tensor, length in wanted.items():
        if len(tensors[tensor]) != length:
            raise RecordError(f"{name}: {tensor} has {len(tensors[tensor])} rows, wanted {length}; record again")


def _spread(rows: torch.Tensor, has_T: torch.Tensor) -> torch.Tensor:
    """Rows to their places, zeros elsewhere."""
    placed = rows.new_zeros(len(has_T), *rows.shape[1:])
    placed[has_T] = rows
    return placed
