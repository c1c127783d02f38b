"""What the trainer remembers of the stream: the newest requests, and a sample of all that left, cluster by cluster.

Memory is bounded by `max_bytes` of rows (one sample is kept whatever its size), and one time for each request of the
last `ttl_s`; a sample is forgotten `ttl_s` after its request ended, whatever else happens. Nothing is persisted but
what `state` says. All randomness comes from the generator that is passed in, so the same stream gives the same batches.

A burst of short requests ends while the long ones beside it still run, and would push them out of a plain window
before they were drawn: tokens of long answers would be trained on less often than those of short ones. So what
was drawn leaves first, and where nothing was drawn the shortest does. In an overload that leaves short requests
undrawn instead, of which there are more; the reservoir, which is offered all of them, has no such bias.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from onlinespec.config import BufferConfig
from onlinespec.draft.sample import Sample, VerifySteps
from onlinespec.trainer.cluster import Clusters, pooled
from onlinespec.trainer.reservoir import Strata


@dataclass(eq=False)
class _Entry:
    sample: Sample
    cluster: int
    is_failure: bool
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


def live_accept_length(verify: VerifySteps) -> float | None:
    """Tokens made visible per verify step that had drafted tokens; None where there was none."""
    steps = zip(verify.num_committed, verify.num_drafted, strict=True)
    committed = [num_committed for num_committed, num_drafted in steps if num_drafted]
    return sum(committed) / len(committed) if committed else None


class Buffer:
    """Training samples in, batches out. Times are the server's wall clock, passed in."""

    def __init__(self, config: BufferConfig, generator: torch.Generator):
        self.clusters = Clusters(config.num_clusters)
        self.num_failures = 0
        """failure cases added"""
        self._config = config
        self._generator = generator
        self._recent: list[_Entry] = []
        self._reservoir = Strata(config.reservoir_samples, generator)

    def __len__(self) -> int:
        return self.num_recent + self.num_replay

    @property
    def num_recent(self) -> int:
        return len(self._recent)

    @property
    def num_replay(self) -> int:
        return sum(self._reservoir.sizes().values())

    def cluster_sizes(self) -> dict[int, int]:
        """Samples held of each cluster, recent and replay."""
        sizes = Counter(self._reservoir.sizes())
        sizes.update(entry.cluster for entry in self._recent)
        return {cluster: sizes[cluster] for cluster in self.clusters.ids}

    def add(self, sample: Sample, now_s: float) -> int:
        """Remember a finished request; one that has to leave moves on to the reservoir. Returns its cluster."""
        assignment = self.clusters.add(pooled(sample.aux_TA, sample.has_aux_T))
        for gone, into in assignment.merged:
            self._reservoir.merge(gone, into)
            for entry in self._recent:
                entry.cluster = into if entry.cluster == gone else entry.cluster
        is_failure = self._is_failure(sample)
        self.num_failures += is_failure
        cropped = crop(sample, self._config.max_sequence_tokens)
        self._recent.append(_Entry(cropped, assignment.cluster, is_failure))
        while self._is_full:
            leaving = min(self._recent, key=_leaves_first)
            self._recent.remove(leaving)
            self._reservoir.offer(leaving.sample, leaving.cluster)
        self._reservoir.fit(max(0, self._config.max_bytes - self._recent_bytes))
        self.expire(now_s)
        return assignment.cluster

    @property
    def _recent_bytes(self) -> int:
        return sum(entry.sample.num_bytes for entry in self._recent)

    @property
    def _is_full(self) -> bool:
        is_over = len(self._recent) > self._config.recent_samples or self._recent_bytes > self._config.max_bytes
        return is_over and len(self._recent) > 1

    def _is_failure(self, sample: Sample) -> bool:
        accept_length = live_accept_length(sample.verify)
        return accept_length is not None and accept_length < self._config.accept_threshold

    def expire(self, now_s: float) -> None:
        """Forget requests that ended more than `ttl_s` ago."""
        before_s = now_s - self._config.ttl_s
        self._recent = [entry for entry in self._recent if entry.sample.ended_s >= before_s]
        self._reservoir.expire(before_s)

    def clear(self) -> None:
        """Forget everything: the target's weights changed."""
        self._recent.clear()
        self._reservoir.clear()
        self.clusters = Clusters(self._config.num_clusters)

    def draw(self, num_new: int, now_s: float) -> list[Sample]:
        """A batch: `num_new` recent samples, the least drawn and then the newest first, and replay on top.

        While there are failure cases, `failure_frac` of the new ones are such. Replay is `replay_frac` of the
        whole batch, drawn from the reservoir without repeats; there is none while the reservoir is empty.
        """
        self.expire(now_s)
        frac = self._config.replay_frac
        num_replay = self._rounded(num_new * frac / (1 - frac)) if frac < 1 else num_new
        kept = self._reservoir.samples
        replayed = torch.randperm(len(kept), generator=self._generator)[:num_replay].tolist()
        newest = [] if frac == 1 and replayed else self._newest(num_new)
        for entry in newest:
            entry.num_draws += 1
        return [entry.sample for entry in newest] + [kept[i] for i in replayed]

    def _newest(self, num_new: int) -> list[_Entry]:
        newest_first = self._recent[::-1]
        by_draws = sorted(newest_first, key=lambda entry: entry.num_draws)
        failures = [entry for entry in by_draws if entry.is_failure]
        others = [entry for entry in by_draws if not entry.is_failure]
        num_failures = min(self._rounded(self._config.failure_frac * num_new), len(failures)) if failures else 0
        num_failures = max(num_failures, min(num_new - len(others), len(failures)))
        return failures[:num_failures] + others[: num_new - num_failures]

    def _rounded(self, number: float) -> int:
        """Up with the probability of its fraction: a share of a small batch is kept over many."""
        below = math.floor(number)
        return below + int(float(torch.rand((), generator=self._generator)) < number - below)

    def state(self) -> dict[str, Any]:
        """A copy of what the next draws depend on, samples by their request number; plain types and tensors,
        so that `torch.load(weights_only=True)` reads it back. The generator's state is its owner's."""
        return {
            "recent": [
                (entry.sample.request, entry.cluster, entry.is_failure, entry.num_draws) for entry in self._recent
            ],
            "reservoir": self._reservoir.state(),
            "clusters": self.clusters.state(),
            "num_failures": self.num_failures,
        }

    def load_state(self, state: dict[str, Any], samples: Mapping[int, Sample]) -> None:
        """Go on where the buffer that gave this state stood: with its rows the next draws are the same.

        samples: by request number, whole or cropped; empty where the rows are gone (a restart beside a live
        server), then the buffer starts empty, and knows its clusters.
        Raises: KeyError where there are samples and one that the state names is not among them.
        """
        self.clusters.load_state(state["clusters"])
        self.num_failures = state["num_failures"]
        self._recent = []
        self._reservoir.clear()
        if not samples:
            return
        for request, cluster, is_failure, num_draws in state["recent"]:
            cropped = crop(samples[request], self._config.max_sequence_tokens)
            self._recent.append(_Entry(cropped, cluster, is_failure, num_draws))
        wanted = {request for _, of_cluster in state["reservoir"] for request in of_cluster["samples"]}
        self._reservoir.load_state(
            state["reservoir"],
            {request: crop(samples[request], self._config.max_sequence_tokens) for request in wanted},
        )


def _leaves_first(entry: _Entry) -> tuple[bool, int]:
    """Smallest first, the oldest among equals: drawn ones, then the shortest answer. See the module's docstring."""
    return entry.num_draws == 0, 0 if entry.num_draws else entry.sample.num_answer_tokens
