"""Puts requests together again from segments that may arrive with gaps or twice.

Rows are keyed by (request, position), last write wins: a retracted request delivers its rows again. A row
that is missing (cached prefix, dropped message) leaves a hole in `has_aux_T`; a missing token makes the
request worthless and it is dropped and counted. A request whose end never comes is dropped after `ttl_s`.
Rows of requests in flight are bounded by `max_open_bytes`: beyond it the request that holds most is given up,
which loses the fewest requests and keeps one endless one from shutting out all others.

T tokens, A captured layers, D target width, k teacher top-k, N rows of a pass, M rows with a teacher.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from onlinespec.draft.sample import Sample, VerifySteps
from onlinespec.errors import WireError
from onlinespec.trainer.prefix import PrefixRows
from onlinespec.wire.frames import FrameHeader, arrays_of
from onlinespec.wire.messages import RequestEnded, RequestStarted, Rows, Segment

_FLOAT8 = "float8_e4m3fn"
_BIT_PATTERNS = ("bfloat16", _FLOAT8)


@dataclass
class _Open:
    """A request in flight. aux: (position, [n, A*D]); teacher: (position, ids, logits, lse). Each is a copy of its
    own: a slice would keep the rows of all that ran in the same pass alive."""

    started: RequestStarted
    tokens: dict[int, int]
    num_bytes: int = 0
    is_given_up: bool = False
    aux: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    teacher: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    verify: VerifySteps = field(default_factory=VerifySteps)


def _copy_of(header: FrameHeader, rows: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(rows.copy())
    return tensor.view(getattr(torch, header.dtype)) if header.dtype in _BIT_PATTERNS else tensor


def _is_finite(aux_nA: torch.Tensor, _ids: torch.Tensor, logits_mk: torch.Tensor, lse_m: torch.Tensor) -> bool:
    """A teacher logit may be -inf, where a grammar forbids the token. One bad row would spoil clusters and steps."""
    return bool(aux_nA.isfinite().all() and lse_m.isfinite().all() and (logits_mk < torch.inf).all())


class Assembler:
    """Messages in, finished samples out. `counters` says what was lost and why."""

    def __init__(self, prefix_rows: PrefixRows, ttl_s: float, max_open_bytes: int):
        self.counters: Counter[str] = Counter()
        self.open_bytes = 0
        """of rows of requests in flight"""
        self._prefix_rows = prefix_rows
        self._ttl_s = ttl_s
        self._max_open_bytes = max_open_bytes
        self._open: dict[int, _Open] = {}

    def start(self, message: RequestStarted) -> None:
        before = self._open.get(message.request)
        self.open_bytes -= before.num_bytes if before else 0
        self._open[message.request] = _Open(message, dict(enumerate(message.prompt_tokens)))

    def rows(self, message: Rows, frames: Sequence[memoryview]) -> None:
        """Raises: WireError where the frames do not match the segments."""
        arrays = arrays_of(message.frames, frames)
        num_rows = sum(segment.num_rows for segment in message.segments)
        num_teacher = sum(segment.num_teacher_rows for segment in message.segments)
        shapes = [array.shape for array in arrays]
        leading = [shape[:1] for shape in shapes]
        has_scales = message.frames[0].dtype == _FLOAT8 if message.frames else False
        wanted = [(num_rows,), *[(num_teacher,)] * 3, *[(num_rows,)] * has_scales]
        if leading != wanted or [len(shape) for shape in shapes] != [2, 2, 2, 1, *[1] * has_scales]:
            raise WireError(f"frames {shapes} came with {num_rows} rows, {num_teacher} of them with a teacher")
        row = teacher_row = 0
        for segment in message.segments:
            if segment.request in self._open:
                teacher = slice(teacher_row, teacher_row + segment.num_teacher_rows)
                aux = slice(row, row + segment.num_rows)
                parts = zip(message.frames, arrays, [aux, teacher, teacher, teacher, aux][: len(arrays)], strict=True)
                aux_nA, *others = (_copy_of(header, array[rows]) for header, array, rows in parts)
                if has_scales:  # powers of two: exact in bfloat16
                    aux_nA = aux_nA.bfloat16() * others.pop().bfloat16()[:, None]
                self._segment(segment, aux_nA, *others)
            else:
                self.counters["segments_without_start"] += 1
            row += segment.num_rows
            teacher_row += segment.num_teacher_rows
        while self.open_bytes > self._max_open_bytes:
            self._give_up(max(self._open.values(), key=lambda request: request.num_bytes), "samples_over_memory")

    def _give_up(self, request: _Open, counter: str) -> None:
        """It stays open, without rows, so that what still comes of it is not taken for a lost start."""
        self.counters[counter] += 1
        self.open_bytes -= request.num_bytes
        request.num_bytes, request.is_given_up = 0, True
        request.aux.clear()
        request.teacher.clear()

    def _segment(self, segment: Segment, aux_nA: torch.Tensor, *teacher: torch.Tensor) -> None:
        request = self._open[segment.request]
        if request.is_given_up:
            return
        if not _is_finite(aux_nA, *teacher):
            self._give_up(request, "samples_not_finite")
            return
        num_bytes = sum(tensor.nbytes for tensor in (aux_nA, *teacher))
        request.num_bytes += num_bytes
        self.open_bytes += num_bytes
        request.aux.append((segment.position, aux_nA))
        if segment.num_teacher_rows:
            first = segment.position + segment.num_rows - segment.num_teacher_rows
            ids_mk, logits_mk, lse_m = teacher
            request.teacher.append((first, ids_mk, logits_mk, lse_m))
        request.tokens.update(enumerate(segment.tokens, segment.token_position))
        if segment.is_verify:
            verify = request.verify
            verify.start.append(segment.position)
            verify.num_drafted.append(segment.num_drafted)
            verify.num_correct.append(segment.num_correct)
            verify.num_committed.append(len(segment.tokens))
            verify.version.append(segment.version)
            verify.is_mixed.append(segment.is_mixed)
        else:
            self._remember_prefix(request, segment, aux_nA)

    def _remember_prefix(self, request: _Open, segment: Segment, aux_nA: torch.Tensor) -> None:
        """At once, not at the request's end: the next request may hit this prefix while this one runs."""
        end = segment.position + segment.num_rows
        tokens = [request.tokens.get(position) for position in range(end)]
        if None in tokens:
            return
        self._prefix_rows.store(
            torch.tensor(tokens), aux_nA, torch.ones(len(aux_nA), dtype=torch.bool), start=segment.position
        )

    def end(self, message: RequestEnded) -> Sample | None:
        """The finished sample; None where nothing can be learned from it (counted)."""
        request = self._open.pop(message.request, None)
        if request is None:
            self.counters["ends_without_start"] += 1
            return None
        self.open_bytes -= request.num_bytes
        if request.is_given_up:
            return None
        num_tokens = len(request.started.prompt_tokens) + message.num_output_tokens
        tokens = [request.tokens.get(position) for position in range(num_tokens)]
        if None in tokens:
            self.counters["samples_with_lost_tokens"] += 1
            return None
        if not (request.aux and request.teacher and message.num_output_tokens > 1):
            self.counters["samples_too_short"] += 1
            return None
        self.counters["samples"] += 1
        return self._sample(request, message, torch.tensor(tokens, dtype=torch.int64))

    def _sample(self, request: _Open, message: RequestEnded, tokens_T: torch.Tensor) -> Sample:
        num_tokens = len(tokens_T)
        first = request.aux[0][1]
        aux_TA = torch.zeros(num_tokens, first.shape[1], dtype=first.dtype)
        has_aux_T = torch.zeros(num_tokens, dtype=torch.bool)
        for position, rows in request.aux:
            rows = rows[: max(0, num_tokens - position)]
            aux_TA[position : position + len(rows)] = rows
            has_aux_T[position : position + len(rows)] = True
        k = request.teacher[0][1].shape[1]
        ids_Tk = torch.zeros(num_tokens, k, dtype=torch.int64)
        logits_Tk, lse_T = torch.zeros(num_tokens, k), torch.zeros(num_tokens)
        has_teacher_T = torch.zeros(num_tokens, dtype=torch.bool)
        for position, ids, logits, lse in request.teacher:
            span = slice(position, min(position + len(lse), num_tokens))
            count = max(0, span.stop - span.start)
            ids_Tk[span], logits_Tk[span], lse_T[span] = ids[:count].long(), logits[:count], lse[:count]
            has_teacher_T[span] = True
        num_completed = self._complete(tokens_T, aux_TA, has_aux_T)
        self._prefix_rows.store(tokens_T, aux_TA, has_aux_T)
        started = request.started
        return Sample(
            request=message.request,
            tenant=started.tenant,
            num_prompt_tokens=len(started.prompt_tokens),
            temperature=started.temperature,
            tokens_T=tokens_T,
            aux_TA=aux_TA,
            has_aux_T=has_aux_T,
            teacher_ids_Tk=ids_Tk,
            teacher_logits_Tk=logits_Tk,
            teacher_lse_T=lse_T,
            has_teacher_T=has_teacher_T,
            verify=request.verify,
            finish_reason=message.reason,
            started_s=started.time_s,
            ended_s=message.time_s,
            num_completed_rows=num_completed,
        )

    def _complete(self, tokens_T: torch.Tensor, aux_TA: torch.Tensor, has_aux_T: torch.Tensor) -> int:
        """Complete the request from the cache; file its rows, and itself, under where they came from. Returns how many
        rows the cache had."""
        num_rows, num_captured = len(tokens_T) - 1, int(has_aux_T[:-1].sum())
        num_completed = self._prefix_rows.complete(tokens_T[:-1], aux_TA[:-1], has_aux_T[:-1])
        num_missing = num_rows - num_captured - num_completed
        self.counters["rows_captured"] += num_captured
        self.counters["rows_completed"] += num_completed
        self.counters["rows_missing"] += num_missing
        kind = "missing_context" if num_missing else "completed" if num_completed else "complete"
        self.counters[f"samples_{kind}"] += 1
        return num_completed

    def row_shares(self) -> dict[str, float]:
        """Of the rows that finished requests should have: captured, completed from the cache, missing. Empty before
        the first."""
        counts = {kind: self.counters[f"rows_{kind}"] for kind in ("captured", "completed", "missing")}
        total = sum(counts.values())
        return {kind: count / total for kind, count in counts.items()} if total else {}

    def clear(self) -> None:
        """Forget every row: the target's weights changed. What still comes of requests in flight is passed over."""
        for request in self._open.values():
            if not request.is_given_up:
                self._give_up(request, "samples_of_another_target")
        self._prefix_rows.clear()

    def expire(self, now_s: float) -> None:
        """Drop requests that started more than `ttl_s` ago and never ended."""
        for number, request in list(self._open.items()):
            if now_s - request.started.time_s > self._ttl_s:
                del self._open[number]
                self.open_bytes -= request.num_bytes
                if request.is_given_up:
                    continue
                self.counters["samples_expired"] += 1
