"""Whether traffic has moved away from the draft: falls of acceptance, per task cluster and draft position.

What is watched is acceptance *given that the position was reached*: of the verify steps that drafted at least k
tokens and accepted the first k - 1, the share that accepted the k-th. So a change of depth changes how many steps
there are and not what they say. Each pair of cluster and position has its own one-sided Page-Hinkley test, in its
form as a sum that is never below zero, against the mean of all steps so far: a change of the mix of clusters moves
the accept length of the server and none of these. Where the accept length falls and the clusters explain it, that is
told as `mix`.

Steps of one request resemble each other, so sums over requests spread wider than coins would; the threshold grows
with the spread that was measured (the design effect of cluster sampling), or easy and hard requests alone would
raise alarms.

A swap. Steps count for the version in service only, and never the mixed first one. At a swap the sums start again,
since evidence against the old draft says nothing of the new one; the reference stays: were it learned anew, traffic
that turns at about the time of a swap would never be noticed, and swaps are frequent exactly then. A better draft
raises the reference once it has `min_steps` of its own; a worse one does not lower it at once, and if acceptance
fell from the swap on it is told as `draft`, not as `traffic`: the fall began with the version. After an alarm the
level is learned anew, so that one fall is told once.

A cluster that opens late has no past to fall from: once it has `min_steps`, it is `new_traffic` where its first
position is accepted less often than that of the others.

Source: Page 1954, "Continuous Inspection Schemes"; Kish 1965, "Survey Sampling", for the design effect.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal

from onlinespec.config import DriftConfig
from onlinespec.draft.sample import VerifySteps

Kind = Literal["traffic", "draft", "new_traffic", "mix"]


@dataclass(frozen=True)
class DriftEvent:
    """A fall that was proven. cluster: None where it is of all together. position: draft position, 1 the first.
    was, now: acceptance before, and since the fall began, over so many verify steps."""

    kind: Kind
    cluster: int | None
    position: int
    was: float
    now: float
    num_steps: int

    def __str__(self) -> str:
        where = "all clusters" if self.cluster is None else f"cluster {self.cluster}"
        fell = f"acceptance at position {self.position} {self.was:.2f} -> {self.now:.2f}"
        return f"{self.kind} in {where}: {fell} over {self.num_steps} verify steps"


@dataclass
class Acceptance:
    """One Page-Hinkley test, fed request by request. own_*: of the version in service; fall_*: since `fall` was 0."""

    num_steps: int = 0
    mean: float = 0.0
    own_steps: int = 0
    own_mean: float = 0.0
    fall: float = 0.0
    fall_steps: int = 0
    fall_correct: int = 0
    square: float = 0.0
    """sum over requests of the squared deviation of accepted tokens from what the mean lets expect"""
    variance: float = 0.0
    """what that sum would be for independent steps"""

    def observe(self, correct: int, steps: int, config: DriftConfig) -> bool:
        """Take one request's steps; True where they prove a fall."""
        if not steps:
            return False
        is_known = self.num_steps >= config.min_steps
        if is_known:
            deviation = steps * self.mean - correct
            self.fall = max(0.0, self.fall + deviation - steps * config.slack_frac)
            self.fall_steps = self.fall_steps + steps if self.fall else 0
            self.fall_correct = self.fall_correct + correct if self.fall else 0
            has_fallen = self.fall > config.threshold * self.design_effect
            self.square += deviation * deviation
            self.variance += steps * self.mean * (1 - self.mean)
            if has_fallen:
                return True
        self.num_steps += steps
        self.mean += (correct - steps * self.mean) / self.num_steps
        self.own_steps += steps
        self.own_mean += (correct - steps * self.own_mean) / self.own_steps
        if self.own_steps >= config.min_steps and self.own_mean > self.mean + config.slack_frac:
            self.num_steps, self.mean = self.own_steps, self.own_mean
        return False

    @property
    def design_effect(self) -> float:
        """How much wider sums over requests spread than those of independent steps; at least 1."""
        return max(1.0, self.square / self.variance) if self.variance else 1.0

    def fell_with_the_draft(self, min_steps: int) -> bool:
        """The reference is another version's, and before the fall this one had too few steps to be told from it."""
        return self.own_steps < self.num_steps and self.own_steps - self.fall_steps < min_steps

    def swap(self) -> None:
        """Another version came into service."""
        self.own_steps, self.own_mean = 0, 0.0
        self.fall, self.fall_steps, self.fall_correct = 0.0, 0, 0

    def restart(self) -> None:
        """Learn the level anew; how widely requests spread is remembered."""
        self.swap()
        self.num_steps, self.mean = 0, 0.0


class Drift:
    """See the module's docstring. Memory: a few numbers per cluster and position."""

    def __init__(self, config: DriftConfig):
        self.counters: Counter[str] = Counter()
        """events by kind"""
        self.last: DriftEvent | None = None
        self._config = config
        self._version = 0
        self._of: dict[int, list[Acceptance]] = {}
        self._late: set[int] = set()
        """clusters that opened when others were known, and have not been judged"""
        self._all = Acceptance()
        self._unexplained = 0.0
        """what `_all.fall` would be, were each cluster held against its own mean: the mix moves only the other"""

    def observe(self, cluster: int, verify: VerifySteps, version: int) -> list[DriftEvent]:
        """Take a finished request. version: the draft in service; steps of others are passed over."""
        if not self._config.enabled:
            return []
        if version != self._version:
            self._version = version
            self._unexplained = 0.0
            for test in (self._all, *(test for tests in self._of.values() for test in tests)):
                test.swap()
        counts = accepted_by_position(verify, version)
        if not counts:
            return []
        if cluster not in self._of:
            if any(tests[0].num_steps >= self._config.min_steps for tests in self._of.values()):
                self._late.add(cluster)
            self._of[cluster] = []
        tests = self._of[cluster]
        tests += [Acceptance() for _ in range(len(counts) - len(tests))]
        first = tests[0].mean if tests[0].num_steps >= self._config.min_steps else None
        events = [*self._fallen(cluster, counts), *self._newcomer(cluster), *self._overall(*counts[0], first)]
        for event in events:
            self.counters[event.kind] += 1
            self.last = event
        return events

    def _fallen(self, cluster: int, counts: list[tuple[int, int]]) -> list[DriftEvent]:
        """At most one: positions of a cluster fall together."""
        tests = self._of[cluster]
        fallen = [place for place, count in enumerate(counts) if tests[place].observe(*count, self._config)]
        if not fallen:
            return []
        test = tests[fallen[0]]
        kind: Kind = "draft" if test.fell_with_the_draft(self._config.min_steps) else "traffic"
        event = _event(kind, cluster, fallen[0] + 1, test)
        for test in tests:
            test.restart()
        self._all.restart()
        self._unexplained = 0.0
        return [event]

    def _newcomer(self, cluster: int) -> list[DriftEvent]:
        test = self._of[cluster][0]
        if cluster not in self._late or test.num_steps < self._config.min_steps:
            return []
        self._late.remove(cluster)
        others = [tests[0] for name, tests in self._of.items() if name != cluster]
        num_steps = sum(other.num_steps for other in others)
        if not num_steps:
            return []
        mean = sum(other.mean * other.num_steps for other in others) / num_steps
        if test.mean >= mean - self._config.slack_frac:
            return []
        return [DriftEvent("new_traffic", cluster, 1, mean, test.mean, test.num_steps)]

    def _overall(self, correct: int, steps: int, cluster_mean: float | None) -> list[DriftEvent]:
        """All clusters as one. cluster_mean: of this request's cluster before it; None where it is not known yet."""
        has_fallen = self._all.observe(correct, steps, self._config)
        missing = 0.0 if cluster_mean is None else steps * (cluster_mean - self._config.slack_frac) - correct
        self._unexplained = max(0.0, self._unexplained + missing)
        if not has_fallen:
            return []
        is_mix = self._unexplained < self._all.fall / 2
        is_draft = self._all.fell_with_the_draft(self._config.min_steps)
        kind: Kind = "mix" if is_mix else "draft" if is_draft else "traffic"
        event = _event(kind, None, 1, self._all)
        self._all.restart()
        self._unexplained = 0.0
        return [event]

    def keep_only(self, clusters: Collection[int]) -> None:
        """Forget clusters that are no more: they became one with others."""
        for gone in self._of.keys() - set(clusters):
            del self._of[gone]
            self._late.discard(gone)

    def acceptance(self) -> dict[int, list[float]]:
        """Mean acceptance of each cluster, position by position, for people."""
        return {cluster: [test.mean for test in tests] for cluster, tests in self._of.items()}

    def state(self) -> dict[str, Any]:
        """A copy, in plain types."""
        return {
            "version": self._version,
            "clusters": {cluster: [asdict(test) for test in tests] for cluster, tests in self._of.items()},
            "late": sorted(self._late),
            "all": asdict(self._all),
            "unexplained": self._unexplained,
            "counters": dict(self.counters),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where the one that gave this state stood."""
        self._version = state["version"]
        self._of = {cluster: [Acceptance(**test) for test in tests] for cluster, tests in state["clusters"].items()}
        self._late = set(state["late"])
        self._all = Acceptance(**state["all"])
        self._unexplained = state["unexplained"]
        self.counters = Counter(state["counters"])


def accepted_by_position(verify: VerifySteps, version: int) -> list[tuple[int, int]]:
    """(accepted, reached) of each draft position, over this version's unmixed steps; empty where there are none."""
    steps = [
        (drafted, min(correct, drafted))
        for drafted, correct, by, is_mixed in zip(
            verify.num_drafted, verify.num_correct, verify.version, verify.is_mixed, strict=True
        )
        if by == version and not is_mixed and drafted
    ]
    deepest = max((drafted for drafted, _ in steps), default=0)
    return [
        (
            sum(correct >= k for _, correct in steps),
            sum(drafted >= k and correct >= k - 1 for drafted, correct in steps),
        )
        for k in range(1, deepest + 1)
    ]


def _event(kind: Kind, cluster: int | None, position: int, test: Acceptance) -> DriftEvent:
    return DriftEvent(kind, cluster, position, test.mean, test.fall_correct / test.fall_steps, test.fall_steps)
