"""A race cut into slices: no part of the traffic may pay for the gain of another.

Dimensions: the tenant's label, the task cluster, how long the answer is, and whether verification was greedy. In
each, a slice is one label, or the rest: all requests whose label was small when they came.

Proof. A slice that holds at least `slice_min_frac` of the race's requests must be *shown* to lose less than
`slice_tolerance_tokens` before the candidate is promoted: an e-process against "mean <= -tolerance" stands at 1 /
slice_alpha. Absence of evidence is not enough. This is an intersection-union test: a candidate that loses more in
some such slice needs the e-process of that very slice to err, so its chance of promotion is at most slice_alpha
however many slices there are, and none is corrected for. The share is read with 1.5 standard errors in doubt's
favour: else a slice of a third, few of whose requests came first, would go unasked. A slice that is the whole race
asks nothing: the main test says more.

Harm. Every slice, small ones too, is watched for "mean >= -tolerance" rejected, which refuses the candidate at
once. Here one error of many slices suffices, so the i-th slice of a race is watched at slice_alpha / (i (i + 1)):
these sum to slice_alpha however many come, and the large slices, which come early, are watched closest. An error
refuses a candidate, which costs a race, never a false promotion.

Both run from the race's first request on, whatever becomes large later. A request is in the rest where its label,
this request counted, holds less than slice_min_frac of its dimension so far: that is known before its difference,
so the rest's e-processes bet on the past alone too. What is promised of the rest is its mean: of a tenant with a
twentieth of the traffic only the watch for harm speaks.

Memory: `MAX_LABELS` labels of a dimension have a slice, in order of appearance; others are in the rest only. Labels
are of the request as it came: two task clusters that become one leave their evidence where it is.

Source of the test of many hypotheses that must all be rejected: Berger 1982, "Multiparameter hypothesis testing and
acceptance sampling" (intersection-union).
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping

from onlinespec.config import GateConfig
from onlinespec.gate.eprocess import build_test
from onlinespec.gate.verdict import SliceResult, Walked

MAX_LABELS = 16
_SHARE_ERRORS = 1.5
"""standard errors by which a slice's share is taken for larger than it was"""
REST = "(rest)"
LENGTH_EDGES_TOKENS = (0, 32, 128, 512)


def slice_labels(tenant: str, cluster: int | None, num_answer_tokens: int, temperature: float) -> dict[str, str]:
    """The slice of a request in each dimension. cluster: None before there are any. temperature: of verification."""
    shortest = max(edge for edge in LENGTH_EDGES_TOKENS if num_answer_tokens >= edge)
    return {
        "tenant": tenant,
        "cluster": "(none)" if cluster is None else str(cluster),
        "answer": f"of {shortest} tokens and more",
        "temperature": "sampling" if temperature > 0.0 else "greedy",
    }


class Slice:
    """Requests that share a label, and what they say. alpha: level at which harm is watched."""

    def __init__(self, dimension: str, label: str, harm_alpha: float, bound_tokens: float, config: GateConfig):
        self.dimension = dimension
        self.label = label
        self.harm_alpha = harm_alpha
        self.num_requests = 0
        self.incumbent = Walked()
        self.candidate = Walked()
        self._proof = build_test(config.test, bound_tokens, -config.slice_tolerance_tokens)
        self._harm = build_test(config.test, bound_tokens, config.slice_tolerance_tokens)
        self._proof_alpha = config.slice_alpha
        self._sum_gain = 0.0

    def __str__(self) -> str:
        return f"{self.dimension} {self.label} ({self.mean_gain_tokens:+.2f} tokens over {self.num_requests} requests)"

    @property
    def mean_gain_tokens(self) -> float:
        return self._sum_gain / max(self.num_requests, 1)

    @property
    def is_proven(self) -> bool:
        return bool(self._proof.has_rejected(self._proof_alpha))

    @property
    def is_harmed(self) -> bool:
        return bool(self._harm.has_rejected(self.harm_alpha))

    def observe(self, gain_tokens: float, incumbent: Walked, candidate: Walked) -> None:
        self._proof.observe(gain_tokens)
        self._harm.observe(-gain_tokens)
        self.num_requests += 1
        self._sum_gain += gain_tokens
        self.incumbent += incumbent
        self.candidate += candidate

    def result(self, is_required: bool) -> SliceResult:
        return SliceResult(
            dimension=self.dimension,
            label=self.label,
            num_requests=self.num_requests,
            mean_gain_tokens=self.mean_gain_tokens,
            incumbent=self.incumbent,
            candidate=self.candidate,
            e_proof=self._proof.e_value,
            e_harm=self._harm.e_value,
            harm_threshold=1.0 / self.harm_alpha,
            is_required=is_required,
            is_proven=self.is_proven,
        )


class Slices:
    """All slices of one race. See the module's docstring."""

    def __init__(self, bound_tokens: float, config: GateConfig):
        self._bound_tokens = bound_tokens
        self._config = config
        self._slices: dict[tuple[str, str | None], Slice] = {}
        """by dimension and label; None is the rest, which no client can name"""
        self._num_labels: Counter[str] = Counter()
        """by dimension: labels with a slice"""
        self._num_requests = 0

    def observe(self, labels: Mapping[str, str], gain_tokens: float, incumbent: Walked, candidate: Walked) -> None:
        """Enter a request into its slice of each dimension. labels: the same dimensions for every request of a race."""
        self._num_requests += 1
        for dimension, label in labels.items():
            for place in self._places(dimension, label):
                place.observe(gain_tokens, incumbent, candidate)

    @property
    def harmed(self) -> Slice | None:
        """A slice that is shown to lose more than the tolerance; None where there is none."""
        return next((part for part in self._slices.values() if part.is_harmed), None)

    @property
    def unproven(self) -> Slice | None:
        """A slice a promotion waits for; None where it waits for none."""
        return next((part for part in self._slices.values() if self._is_required(part) and not part.is_proven), None)

    def results(self) -> tuple[SliceResult, ...]:
        """Largest first."""
        parts = sorted(self._slices.values(), key=lambda part: -part.num_requests)
        return tuple(part.result(self._is_required(part)) for part in parts)

    def _is_required(self, part: Slice) -> bool:
        """It may hold the share that matters, and is not the whole race, of which the main test says more."""
        wanted = self._config.slice_min_frac
        error = math.sqrt(wanted * (1.0 - wanted) / self._num_requests)
        return (wanted - _SHARE_ERRORS * error) * self._num_requests <= part.num_requests < self._num_requests

    def _places(self, dimension: str, label: str) -> Iterator[Slice]:
        """The label's own slice, where there is room for one; the rest, where the label is small."""
        num_before = 0
        if (dimension, label) in self._slices or self._num_labels[dimension] < MAX_LABELS:
            own = self._slice(dimension, label)
            num_before = own.num_requests
            yield own
        if num_before + 1 < self._config.slice_min_frac * self._num_requests:
            yield self._slice(dimension, None)

    def _slice(self, dimension: str, label: str | None) -> Slice:
        if (dimension, label) not in self._slices:
            number = len(self._slices) + 1
            alpha = self._config.slice_alpha / (number * (number + 1))
            self._slices[dimension, label] = Slice(
                dimension, REST if label is None else label, alpha, self._bound_tokens, self._config
            )
            self._num_labels[dimension] += label is not None
        return self._slices[dimension, label]
