"""Numbers requests and turns one committed forward pass into segments.

Keyed by our own number, kept on SGLang's request object: a client's `rid` may repeat. Works on host values
only; what a position is comes from the commit (`output_index`), which is right under overlap scheduling too.
"""

import itertools
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from onlinespec.wire.messages import RequestEnded, RequestStarted, Segment

_STATE = "_onlinespec"
_SEED = 0x6F6E6C696E657370


@dataclass
class RequestState:
    """Ours, on one SGLang request. drafted_by: version of the draft that made its next first drafted token."""

    number: int
    is_captured: bool
    is_started: bool = False
    drafted_by: int = 0


@dataclass
class Pass:
    """The rows of one forward pass that are kept: segments, and for each its first row in the pass's tensors."""

    segments: list[Segment] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    teacher_rows: list[int] = field(default_factory=list)


class RequestBook:
    """Every running request's state; see the module's docstring."""

    def __init__(self, is_greedy: bool):
        self.sample_frac = 1.0
        """share of requests captured, of those first seen from now on; may be set from another thread"""
        self.num_target_updates = 0
        """updates of the target's weights that were begun"""
        self.num_sampled_out = 0
        """requests that could have been captured and were left out for `sample_frac`"""
        self._is_greedy = is_greedy
        self._numbers = itertools.count(1)
        self._running: dict[int, weakref.ref[Any]] = {}
        """weak: SGLang drops a retracted request that is aborted while it waits without finishing it"""

    def state_of(self, req: Any) -> RequestState:
        """The request's state, made at first sight. Source: SGLang 0.5.23 managers/schedule_batch.py Req."""
        state = getattr(req, _STATE, None)
        if state is None:
            number, is_captured = next(self._numbers), _is_capturable(req)
            if is_captured and not is_sampled(number, self.sample_frac):
                is_captured = False
                self.num_sampled_out += 1
            state = RequestState(number, is_captured)
            setattr(req, _STATE, state)
        return state

    def start(self, req: Any, state: RequestState, cached_tokens: int) -> RequestStarted:
        state.is_started = True
        self._running[state.number] = weakref.ref(req)
        params = req.sampling_params
        return RequestStarted(
            request=state.number,
            tenant=_label(req, "tenant"),
            prompt_tokens=list(req.origin_input_ids),
            cached_tokens=cached_tokens,
            temperature=effective_temperature(params.temperature, params.top_k, self._is_greedy),
            top_k=int(params.top_k),
            top_p=float(params.top_p),
            time_s=time.time(),
            target_updates=self.num_target_updates,
        )

    def ended(self) -> list[RequestEnded]:
        """Requests that finished or were aborted since the last call."""
        messages = []
        for number, reference in list(self._running.items()):
            req = reference()
            if req is not None and not req.finished():
                continue
            del self._running[number]
            messages.append(self._ended(req, number))
        return messages

    def _ended(self, req: Any | None, number: int) -> RequestEnded:
        """req: None where SGLang dropped it."""
        if req is None:
            return RequestEnded(number, "abort", 0, 0, 0, time.time(), self.num_target_updates)
        reason = req.finished_reason
        return RequestEnded(
            request=number,
            reason=str(reason.to_json().get("type", "")) if reason is not None else "",
            num_verify_steps=int(req.spec_verify_ct),
            num_correct_drafts=int(req.spec_num_correct_drafts),
            num_output_tokens=len(req.output_ids) if req.finished_len is None else int(req.finished_len),
            time_s=time.time(),
            target_updates=self.num_target_updates,
        )


def is_sampled(number: int, sample_frac: float) -> bool:
    """True for a share `sample_frac` of request numbers; raising the share only adds requests.

    Source: the finaliser of SplitMix64, Steele, Lea, Flood 2014.
    """
    mixed = (number * 0x9E3779B97F4A7C15 + _SEED) % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return (mixed ^ mixed >> 31) < sample_frac * 2.0**64


def effective_temperature(temperature: float, top_k: int, is_greedy: bool) -> float:
    """Temperature the verifier uses; 0 where it takes the argmax.

    Source: SGLang 0.5.23 sampling/sampling_params.py normalize (temperature 0 becomes top_k 1) and
    speculative/eagle_utils.py _verify_uses_greedy (a CPU is always greedy).
    """
    return 0.0 if is_greedy or top_k == 1 else float(temperature)


def prefill_pass(
    book: RequestBook,
    reqs: Sequence[Any],
    commits: Sequence[Any],
    prefix_lens: Sequence[int],
    extend_lens: Sequence[int],
) -> tuple[Pass, list[RequestStarted]]:
    """Segments of a prefill: row j of request i is position prefix_lens[i] + j; its last row has the teacher."""
    kept, started, first_row = Pass(), [], 0
    for i, (req, commit) in enumerate(zip(reqs, commits, strict=True)):
        state = book.state_of(req)
        if state.is_captured and extend_lens[i]:
            if not state.is_started:
                started.append(book.start(req, state, prefix_lens[i]))
            num_prompt = len(req.origin_input_ids)
            kept.segments.append(
                Segment(
                    request=state.number,
                    is_verify=False,
                    position=prefix_lens[i],
                    num_rows=extend_lens[i],
                    tokens=list(commit.token_ids) if commit else [],
                    token_position=num_prompt + commit.output_index if commit else 0,
                    num_teacher_rows=1 if commit else 0,
                    num_drafted=0,
                    num_correct=0,
                    version=0,
                    is_mixed=False,
                )
            )
            kept.rows.extend(range(first_row, first_row + extend_lens[i]))
            kept.teacher_rows.extend([i] if commit else [])
        first_row += extend_lens[i]
    return kept, started


def verify_pass(
    book: RequestBook,
    reqs: Sequence[Any],
    commits: Sequence[Any],
    accept_lens: Sequence[int],
    width: int,
    drafted_by: Sequence[tuple[int, int]],
) -> Pass:
    """Segments of a verify step of a chain of `width` tokens: row j of request i stands at i * width + j.

    Row 0 is the bonus token of the step before, position num_prompt + output_index - 1. accept_lens counts
    past an early stop, so rows end where the commit ends. drafted_by[i]: versions of the draft that made
    the first drafted token and the others.
    """
    kept = Pass()
    for i, (req, commit) in enumerate(zip(reqs, commits, strict=True)):
        state = book.state_of(req)
        if commit is None or not (state.is_captured and state.is_started):
            continue
        num_rows = min(int(accept_lens[i]), len(commit.token_ids) + 1)
        token_position = len(req.origin_input_ids) + commit.output_index
        first_by, by = drafted_by[i]
        kept.segments.append(
            Segment(
                request=state.number,
                is_verify=True,
                position=token_position - 1,
                num_rows=num_rows,
                tokens=list(commit.token_ids),
                token_position=token_position,
                num_teacher_rows=num_rows,
                num_drafted=width - 1,
                num_correct=int(accept_lens[i]) - 1,
                version=by,
                is_mixed=first_by != by,
            )
        )
        rows = range(i * width, i * width + num_rows)
        kept.rows.extend(rows)
        kept.teacher_rows.extend(rows)
    return kept


def _is_capturable(req: Any) -> bool:
    """Multimodal and LoRA requests, those that bring embeddings for tokens, and those that refuse, are served only."""
    if req.multimodal_inputs is not None or req.lora_id is not None or req.input_embeds is not None:
        return False
    return _label(req, "capture", True) is not False


def _label(req: Any, name: str, default: Any = "") -> Any:
    """A field of the request's custom_params {"onlinespec": {...}}."""
    params = req.sampling_params.custom_params
    ours = params.get("onlinespec") if isinstance(params, dict) else None
    return ours.get(name, default) if isinstance(ours, dict) else default
