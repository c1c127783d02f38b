"""Task clusters of the stream: online k-means on pooled hidden states, bounded and without a scale to set.

A request is pooled to one point on the unit sphere: its rows at unit length (a row of huge activations, such as
the first token's, then weighs like any other), averaged, and folded to 256 features. Each request is first a
cluster of its own; two clusters are one where the squared distance of their centres, less what chance explains,
is below `_MIN_SEPARATION` times the mean squared distance of requests to their own centre. That distance is
measured on the stream itself, so the rule is the same for every target. Where there would be more than
`max_clusters`, the nearest two become one. The first 32 requests stay apart until all have come, since the scale is
not known before.

Measured on the demo's target: its four domains lie 4 to 12 such units apart; in 120 orders no two were put together,
and in 21 some domain was several clusters, by its templates. Many more tasks than `max_clusters` (20 for 8) can
become one.
Source of the folding: Weinberger et al. 2009, "Feature Hashing for Large Scale Multitask Learning".

T tokens of a request, A captured layers times D, F features, C clusters.
"""

from dataclasses import dataclass
from typing import Any

import torch

NUM_FEATURES = 256
_MIN_SEPARATION = 3.25
_WARMUP_REQUESTS = 32
"""first requests that are each a cluster of its own: merged two by two too early, different tasks become one"""
_MEMORY_REQUESTS = 500.0
"""a centre follows its cluster as a mean over about so many requests"""
_FOLD_SEED = 20261121


def pooled(aux_TA: torch.Tensor, has_aux_T: torch.Tensor) -> torch.Tensor:
    """A request's point on the unit sphere; zeros where it has no rows.

    Shapes: [T, A], bool [T]; float32 [F] comes back.
    """
    norm_T = aux_TA.float().norm(dim=1)
    weight_T = torch.where(has_aux_T & (norm_T > 0), 1 / norm_T.clamp_min(1e-30), 0.0)
    mean_A = weight_T @ aux_TA.float()
    generator = torch.Generator().manual_seed(_FOLD_SEED)
    place_A = torch.randint(NUM_FEATURES, mean_A.shape, generator=generator)
    sign_A = 2.0 * torch.randint(2, mean_A.shape, generator=generator) - 1
    return torch.nn.functional.normalize(torch.zeros(NUM_FEATURES).index_add_(0, place_A, mean_A * sign_A), dim=0)


@dataclass(frozen=True)
class Assignment:
    """A request's cluster, and the clusters (gone, into) that became one at this request."""

    cluster: int
    merged: tuple[tuple[int, int], ...] = ()


class Clusters:
    """See the module's docstring. The same stream gives the same clusters; ids are never given twice."""

    def __init__(self, max_clusters: int):
        self.ids: list[int] = []
        """clusters there are, oldest first; the order of every other list here"""
        self.num_requests: list[float] = []
        """requests of each cluster, those of clusters that became one with it included; a memory, it is capped"""
        self._max_clusters = max_clusters
        self._centre_CF = torch.zeros(0, NUM_FEATURES)
        self._next_id = 0
        self._num_seen = 0
        self._scatter = 0.0
        """sum of squared distances to the own centre, and its degrees of freedom"""
        self._freedom = 0.0

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, point_F: torch.Tensor) -> Assignment:
        """The request's cluster, which moves a little towards it. Shapes: [F]."""
        cluster = newcomer = self._next_id
        self._next_id += 1
        self._num_seen += 1
        self.ids.append(newcomer)
        self.num_requests.append(1.0)
        self._centre_CF = torch.cat([self._centre_CF, point_F[None]])
        merged: list[tuple[int, int]] = []
        while (pair := self._mergeable()) is not None:
            gone, into = self._merge(*pair)  # the newcomer is the last and the smallest: it goes at its first merge
            cluster = into if cluster == gone else cluster
            if gone != newcomer:
                merged.append((gone, into))
        if cluster != newcomer:
            self._next_id -= 1  # the id was never seen outside
        return Assignment(cluster, tuple(merged))

    def nearest(self, point_F: torch.Tensor) -> int | None:
        """The cluster a request would belong to, were none opened for it; None before the first. Changes nothing."""
        if not self.ids:
            return None
        return self.ids[int((self._centre_CF - point_F).square().sum(1).argmin())]

    @property
    def spread(self) -> float:
        """Mean squared distance of a request to its own centre; 0.0 before any two were one."""
        return self._scatter / self._freedom if self._freedom else 0.0

    def _mergeable(self) -> tuple[int, int, bool] | None:
        """Places (kept, gone) of the nearest two, where they are one or too many; and whether they are one."""
        is_early = self._max_clusters > 1 and self._num_seen < _WARMUP_REQUESTS
        if len(self.ids) < 2 or is_early:
            return None
        count_C = torch.tensor(self.num_requests)
        gram_CC = self._centre_CF @ self._centre_CF.T
        square_C = gram_CC.diagonal()
        distance_CC = square_C[:, None] + square_C - 2 * gram_CC
        distance_CC -= self.spread * (1 / count_C[:, None] + 1 / count_C)
        distance_CC.fill_diagonal_(torch.inf)
        first, second = sorted(divmod(int(distance_CC.argmin()), len(self.ids)))
        is_one = float(distance_CC[first, second]) <= _MIN_SEPARATION * self.spread
        if not is_one and len(self.ids) <= self._max_clusters:
            return None
        return (first, second, is_one) if count_C[first] >= count_C[second] else (second, first, is_one)

    def _merge(self, kept: int, gone: int, is_one: bool) -> tuple[int, int]:
        """The larger takes the smaller in; ids (gone, kept). Scatter grows as the variance of the union does.

        Two that only had to make room do not count once the scale is known: it would grow until all were one.
        """
        count, other = self.num_requests[kept], self.num_requests[gone]
        step_F = self._centre_CF[gone] - self._centre_CF[kept]
        if is_one or self._freedom < _WARMUP_REQUESTS / 2:
            self._scatter += count * other / (count + other) * float(step_F.square().sum())
            self._freedom += 1
        self._centre_CF[kept] += other / (count + other) * step_F
        self.num_requests[kept] = min(count + other, _MEMORY_REQUESTS)
        if self._freedom > 4 * _MEMORY_REQUESTS:
            self._scatter, self._freedom = self._scatter / 2, self._freedom / 2
        ids = self.ids[gone], self.ids[kept]
        self._centre_CF = torch.cat([self._centre_CF[:gone], self._centre_CF[gone + 1 :]])
        del self.ids[gone], self.num_requests[gone]
        return ids

    def state(self) -> dict[str, Any]:
        """A copy of everything the next assignments depend on; `torch.load(weights_only=True)` reads it back."""
        return {
            "ids": list(self.ids),
            "num_requests": list(self.num_requests),
            "centres": self._centre_CF.clone(),
            "next_id": self._next_id,
            "num_seen": self._num_seen,
            "scatter": self._scatter,
            "freedom": self._freedom,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where the clusters that gave this state stood."""
        self.ids = list(state["ids"])
        self.num_requests = list(state["num_requests"])
        self._centre_CF = state["centres"].clone()
        self._next_id = state["next_id"]
        self._num_seen = state["num_seen"]
        self._scatter = state["scatter"]
        self._freedom = state["freedom"]
