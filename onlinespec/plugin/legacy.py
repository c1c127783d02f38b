"""Riding the batch result to the commit, where SGLang has no auxiliary output (0.5.17).

Riders hang on the result object. Around the methods that process a result we note how many output tokens of each
request are visible before, and read from the requests which ones are new after. Both methods first wait for
SGLang's own copy of the result, so `accept_lens` is on the host by then. Unlike the auxiliary output this runs
after the tokens were streamed, which no rider of ours minds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onlinespec.plugin.commits import Rider

_RIDERS = "_onlinespec_riders"


@dataclass(frozen=True)
class VisibleTokens:
    """As SGLang 0.5.23 managers/auxiliary_output.py CommittedTokens."""

    output_index: int
    token_ids: tuple[int, ...]


class LegacyCarrier:
    """See the module's docstring. guard: the fuse."""

    def __init__(self, guard: Callable[..., Any]):
        self._guard = guard

    @property
    def hooks(self) -> Mapping[str, Callable[..., Any]]:
        return {"decode_result": self.around_process, "prefill_result": self.around_process}

    def attach(self, result: Any, rider: Rider) -> None:
        vars(result).setdefault(_RIDERS, []).append(rider)

    def around_process(self, original: Any, processor: Any, batch: Any, result: Any, *args: Any, **kwargs: Any) -> Any:
        """Source: SGLang 0.5.17 managers/scheduler_components/batch_result_processor.py
        process_batch_result_decode, process_batch_result_prefill."""
        riders = vars(result).pop(_RIDERS, [])
        reqs = list(batch.reqs)
        starts = self._guard(_num_visible_of, reqs) if riders else None
        returned = original(processor, batch, result, *args, **kwargs)
        if starts is not None:
            self._guard(_deliver, riders, reqs, starts, result)
        return returned


def _deliver(riders: Sequence[Rider], reqs: Sequence[Any], starts: Sequence[int], result: Any) -> None:
    commits = [_new_tokens(req, start) for req, start in zip(reqs, starts, strict=True)]
    for rider in riders:
        rider.committed(reqs, commits, result.accept_lens)


def _new_tokens(req: Any, start: int) -> VisibleTokens | None:
    """Source: SGLang 0.5.23 managers/scheduler_components/batch_result_processor.py _build_auxiliary_commits."""
    end = _num_visible(req)
    return VisibleTokens(start, tuple(req.output_ids[start:end])) if end > start else None


def _num_visible_of(reqs: Sequence[Any]) -> list[int]:
    return [_num_visible(req) for req in reqs]


def _num_visible(req: Any) -> int:
    return int(req.finished_len) if req.finished_len is not None else len(req.output_ids)
