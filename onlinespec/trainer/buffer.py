"""What the trainer remembers of the stream: the newest requests, and a uniform sample of all that left.

Memory is bounded by the number of samples times `max_sequence_tokens`; a sample is forgotten `ttl_s` after
its request ended, whatever else happens. Nothing is persisted. All randomness comes from the generator
that is passed in, so the same stream gives the same batches. `state` names samples by their request; who resumes
from a recording has the rows.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from onlinespec.config import BufferConfig
from onlinespec.draft.sample import Sample, VerifySteps


@dataclass
class _Entry:
    sample: Sample
    num_draws: int = 0


def crop(sample: Sample, max_tokens: int) -> Sample:
    """The last `max_tokens` tokens of a sample, copied, so that the rest can be freed.

    Positions are counted from the cut. The draft has no positions but RoPE, which only sees distances, so
    this changes nothing but the context that is cut off. Verify steps are dropped: for training only.
    """
    cut = sample.num_tokens - max_tokens
    if cut <= 0:
        return sample
    return replace(
        sample,
        num_prompt_tokens=max(sample.num_prompt_tokens - cut, 0),
        tokens_T=sample.tokens_T[cut:].clone(),
        aux_TA=sample.aux_TA[cut:].clone(),
        has_aux_T=sample.has_aux_T[cut:].clone(),
        teacher_ids_Tk=sample.teacher_ids_Tk[cut:].clone(),
        teacher_logits_Tk=sample.teacher_logits_Tk[cut:].clone(),
        teacher_lse_T=sample.teacher_lse_T[cut:].clone(),
        has_teacher_T=sample.has_teacher_T[cut:].clone(),
        verify=VerifySteps(),
    )


class Reservoir:
    """A uniform sample of fixed size of everything offered that has not expired.

    Expiry leaves holes that later offers fill with the probability that keeps the sample uniform; plain
    reservoir sampling would fill them with whatever comes next.

    Source: Gemulla, Lehner, Haas 2006, "A Dip in the Reservoir", random pairing.
    """

    def __init__(self, capacity: int, generator: torch.Generator):
        self.samples: list[Sample] = []
        self._capacity = capacity
        self._generator = generator
        self._offered_s: deque[float] = deque()
        """end times of all that was offered and has not expired, for their number only"""
        self._holes_inside = 0
        self._holes_outside = 0

    def offer(self, sample: Sample) -> None:
        """Take the sample or not."""
        self._offered_s.append(sample.ended_s)
        holes = self._holes_inside + self._holes_outside
        if holes:
            is_inside = self._below(holes) < self._holes_inside
            self._holes_inside -= is_inside
            self._holes_outside -= not is_inside
            if is_inside:
                self.samples.append(sample)
        elif len(self.samples) < self._capacity:
            self.samples.append(sample)
        elif (place := self._below(len(self._offered_s))) < self._capacity:
            self.samples[place] = sample

    def expire(self, before_s: float) -> None:
        """Forget what ended earlier."""
        kept = [sample for sample in self.samples if sample.ended_s >= before_s]
        num_left = sum(1 for ended_s in self._offered_s if ended_s < before_s)
        if num_left:
            self._offered_s = deque(ended_s for ended_s in self._offered_s if ended_s >= before_s)
        num_inside = len(self.samples) - len(kept)
        self._holes_inside += num_inside
        self._holes_outside += num_left - num_inside
        self.samples = kept

    def state(self) -> dict[str, Any]:
        return {
            "requests": [sample.request for sample in self.samples],
            "offered_s": list(self._offered_s),
            "holes": [self._holes_inside, self._holes_outside],
        }

    def load_state(self, state: dict[str, Any], samples: list[Sample]) -> None:
        self.samples = samples
        self._offered_s = deque(state["offered_s"])
        self._holes_inside, self._holes_outside = state["holes"]

    def _below(self, bound: int) -> int:
        return int(torch.randint(bound, (1,), generator=self._generator))


class Buffer:
    """Training samples in, batches out. Times are the server's wall clock, passed in."""

    def __init__(self, config: BufferConfig, generator: torch.Generator):
        self._config = config
        self._generator = generator
        self._recent: deque[_Entry] = deque()
        self._reservoir = Reservoir(config.reservoir_samples, generator)

    def __len__(self) -> int:
        return len(self._recent) + len(self._reservoir.samples)

    @property
    def num_recent(self) -> int:
        return len(self._recent)

    @property
    def num_replay(self) -> int:
        return len(self._reservoir.samples)

    def add(self, sample: Sample, now_s: float) -> None:
        """Remember a finished request; the oldest recent one moves on to the reservoir."""
        self._recent.append(_Entry(crop(sample, self._config.max_sequence_tokens)))
        if len(self._recent) > self._config.recent_samples:
            self._reservoir.offer(self._recent.popleft().sample)
        self.expire(now_s)

    def expire(self, now_s: float) -> None:
        """Forget requests that ended more than `ttl_s` ago."""
        before_s = now_s - self._config.ttl_s
        if any(entry.sample.ended_s < before_s for entry in self._recent):
            self._recent = deque(entry for entry in self._recent if entry.sample.ended_s >= before_s)
        self._reservoir.expire(before_s)

    def clear(self) -> None:
        """Forget everything: the target's weights changed."""
        self._recent.clear()
        self._reservoir = Reservoir(self._config.reservoir_samples, self._generator)

    def draw(self, num_new: int, now_s: float) -> list[Sample]:
        """A batch: `num_new` recent samples, the least drawn and then the newest first, and replay on top.

        Replay is `replay_frac` of the whole batch, drawn from the reservoir without repeats; there is none
        while the reservoir is empty.
        """
        self.expire(now_s)
        newest_first = list(reversed(self._recent))
        newest_first.sort(key=lambda entry: entry.num_draws)
        newest = newest_first[:num_new]
        frac = self._config.replay_frac
        num_replay = round(num_new * frac / (1 - frac)) if frac < 1 else num_new
        replayed = torch.randperm(self.num_replay, generator=self._generator)[:num_replay].tolist()
        if frac == 1 and replayed:
            newest = []
        for entry in newest:
            entry.num_draws += 1
        return [entry.sample for entry in newest] + [self._reservoir.samples[i] for i in replayed]

    def state(self) -> dict[str, Any]:
        """What the next draws depend on but the rows and the generator; plain numbers and lists."""
        recent = [[entry.sample.request, entry.num_draws] for entry in self._recent]
        return {"recent": recent, "reservoir": self._reservoir.state()}

    def load_state(self, state: dict[str, Any], samples: Mapping[int, Sample]) -> None:
        """Go on where the buffer that gave this state stood. samples: looked up by each request that it names."""

        def cropped(number: int) -> Sample:
            return crop(samples[number], self._config.max_sequence_tokens)

        self._recent = deque(_Entry(cropped(number), num_draws) for number, num_draws in state["recent"])
        self._reservoir.load_state(state["reservoir"], [cropped(number) for number in state["reservoir"]["requests"]])
