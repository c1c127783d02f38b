"""Whether the draft in service still deserves it: watched for weeks, rolled back within a few requests of harm.

Two questions, asked of every finished request under the promoted version. *Quality*: is the version worse than its
parent on the rows of held-out requests? Both are walked over the same rows, so traffic that turns hard takes accept
length from both and blames neither. *Integrity*: does the live server accept what the published weights say it
should? A draft damaged in the server's memory falls to 1.0 live, while the shadow, computed from the file, does not.
A request whose draft KV is all the version's own is *clean*: live and shadow are expected equal but for near ties.
One that stands on KV which an older version left (a cached prefix, steps before the swap) is *aged*: stale keys cost
something by themselves, about 0.1 tokens where measured, and are allowed more. Each of the three is a detector.

A detector. H0, "no harm": given the past, the mean of min(difference, clip) is at least -tolerance, at every request.
With excess = -min(difference, clip) - tolerance, which is at least -(clip + tolerance), every factor 1 + bet * excess
with 0 <= bet < 1 / (clip + tolerance) has a mean of at most 1. The Shiryaev-Roberts sum

    M_n = (M_{n-1} + 1) * (1 + bet * excess_n)  =  sum over j <= n of the product of the factors j..n

stakes one more unit at every request, so harm that begins after months is met by stakes as fresh as on the first
day: M falls back to about 1 in health and is no debt to work off. M_n - n is a supermartingale under H0, and so is
the mean over a grid of bets, which spares guessing how large the harm is. Hence for N the first n with M_n >= c, and
any horizon n, c * P(N <= n) <= E[M_min(N,n)] <= n, and E[N] >= c.

A request feeds at most two detectors (quality; clean or aged), so with c = 2 * false_alarm_requests together:
the chance of a rollback by luck within n requests is at most n / false_alarm_requests, and the mean number of
requests to one is at least false_alarm_requests. At the default of 1e7 a server of 100,000 requests a day rolls a
harmless version back with a chance of at most 1 % a day. That is for a version at the very edge of harm all the
time; for one whose differences have a mean of 0 the factors shrink M by themselves, and the chance is smaller by
orders of magnitude (`benchmarks/guard_delay.py` saw none in 4 million requests). The delay to find harm is about
(log c + log 4) / (mean of log(1 + bet * excess)): it grows by 2.3 nats, one or two requests of gross harm, for every
factor of 10 in `false_alarm_requests`. There, a draft that fell from 2.5 to 1.0 in memory was found after 12 clean
requests (median; 15 at most) or 17 aged ones, and one that lost 0.3 tokens to its parent after 111 to 128.

Clipping gains is what makes it quick: without it a bet could be no larger than 1 / (K + tolerance), lest one request
that went K tokens better ruin it. It changes the question a little: a version that loses on most requests and wins
more than `gain_clip_tokens` on a few is called harmful.

What is not claimed. H0 is given the past: in quality a conversation counts once among the last 4,096, since its turns
share what makes them easy. An excess of the tolerance that lasts only minutes may pass unseen, and one that is real
and undone by the next hour's traffic is still harm. Integrity says that live and shadow differ, not why: a shadow
computed from wrong rows trips it as well. A guard is of one promotion: the next one ends it.

Source: Shin, Ramdas and Rinaldo, "E-detectors: a nonparametric framework for sequential change detection", New
England Journal of Statistics in Data Science, 2023: e-SR detectors, their average run length, and mixtures of them.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import msgspec

from onlinespec.config import GuardConfig
from onlinespec.gate.verdict import Walked

Age = Literal["clean", "aged", "excluded"]
Harm = Literal["quality", "integrity"]
DetectorName = Literal["quality", "clean", "aged"]

_MAX_BET_FRAC = 0.95
_BET_SHARES = (1.0, 0.5, 0.25, 0.125)
"""of the largest bet: half a tolerance of excess wants the smallest, a dead draft the largest"""
_MAX_GROUPS = 4096
_RECENT = 32


@dataclass(frozen=True)
class WatchedRequest:
    """A finished request of the promoted version.

    Quality: shadow and parent are walks over the whole answer; parent is None for a request that is not held out.
    Integrity: live and expected are of the verify steps that `watched_steps` chose, expected is the version's walk from
    where the first of them started; both None where it says excluded. group: 16 bytes, see `holdout`.
    """

    group: bytes
    age: Age
    shadow: Walked | None = None
    parent: Walked | None = None
    live: Walked | None = None
    expected: Walked | None = None


class GuardVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """Harm was shown: the numbers that roll a version back. JSON-able. Units: tokens per verify step."""

    harm: Harm
    detector: DetectorName
    reason: str
    version: int
    parent_version: int
    evidence: float
    """the detector's sum; valid whenever one looks"""
    threshold: float
    num_requests: int
    """requests the detector has seen under this version"""
    mean_tokens: float
    """mean difference over all of them: promoted minus parent, or live minus shadow"""
    recent_mean_tokens: float
    """the same over the last 32"""
    tolerance_tokens: float
    num_excluded: int
    """requests without integrity evidence: a swap inside, another depth, rows missing"""
    num_repeated: int
    """held-out requests passed over in quality for belonging to a conversation that counted"""
    decided_at_s: float


def watched_steps(
    versions: Sequence[int],
    is_mixed: Sequence[bool],
    num_drafted: Sequence[int],
    *,
    version: int,
    num_draft_steps: int,
    is_complete: bool,
    has_stale_prefix: bool,
) -> tuple[Age, int]:
    """Say which verify steps of a request integrity compares, and of what age they are.

    They are the tail served by `version` alone, from the returned index on, the mixed first step left out. Excluded:
    no such tail, another version within it, a step of it at another depth (at depth 0 live is 1.0 and means nothing),
    or rows missing. is_complete: it has the rows that the walk needs. has_stale_prefix: its prompt may have been
    computed, or cached, before `version` came into service, or its walk lacks rows of the prompt.

    Shapes: one entry per verify step, as in `VerifySteps`.
    """
    steps = list(zip(versions, is_mixed, num_drafted, strict=True))
    first = next((place for place, (by, mixed, _) in enumerate(steps) if by == version and not mixed), len(steps))
    tail = steps[first:]
    if not (is_complete and tail) or any(step != (version, False, num_draft_steps) for step in tail):
        return "excluded", len(steps)
    return ("aged" if first or has_stale_prefix else "clean"), first


class Detector:
    """One Shiryaev-Roberts e-detector over a grid of bets (the module's docstring). Memory: constant."""

    def __init__(self, tolerance_tokens: float, clip_tokens: float):
        assert tolerance_tokens >= 0.0, tolerance_tokens
        assert clip_tokens > 0.0, clip_tokens
        self.tolerance_tokens = tolerance_tokens
        self.num_requests = 0
        self._clip_tokens = clip_tokens
        self._bets = [share * _MAX_BET_FRAC / (clip_tokens + tolerance_tokens) for share in _BET_SHARES]
        self._sums = [0.0] * len(self._bets)
        self._total = 0.0
        self._recent: deque[float] = deque(maxlen=_RECENT)

    @property
    def evidence(self) -> float:
        """M_n: at most n in the mean while there is no harm."""
        return math.fsum(self._sums) / len(self._sums)

    @property
    def mean_tokens(self) -> float:
        """Mean difference so far; 0.0 before the first request."""
        return self._total / max(self.num_requests, 1)

    @property
    def recent_mean_tokens(self) -> float:
        return math.fsum(self._recent) / max(len(self._recent), 1)

    def observe(self, difference_tokens: float) -> None:
        """Take one request's difference: above 0 is good."""
        excess = -min(difference_tokens, self._clip_tokens) - self.tolerance_tokens
        self._sums = [(held + 1.0) * (1.0 + bet * excess) for held, bet in zip(self._sums, self._bets, strict=True)]
        self.num_requests += 1
        self._total += difference_tokens
        self._recent.append(difference_tokens)


class Guard:
    """Watches one promoted version until it is rolled back or another is promoted.

    After its verdict a guard takes no more. Memory: 4,096 conversation hashes.
    """

    def __init__(self, config: GuardConfig, version: int, parent_version: int):
        self.version = version
        self.parent_version = parent_version
        self.verdict: GuardVerdict | None = None
        self.num_excluded = 0
        self.num_repeated = 0
        self.threshold = 2.0 * config.false_alarm_requests
        self._aged = partial(Detector, config.aged_tolerance_tokens, config.excess_clip_tokens)
        self.detectors: dict[DetectorName, Detector] = {
            "clean": Detector(config.clean_tolerance_tokens, config.excess_clip_tokens),
            "aged": self._aged(),
            "quality": Detector(config.tolerance_tokens, config.gain_clip_tokens),
        }
        self._groups: OrderedDict[bytes, None] = OrderedDict()

    def observe(self, request: WatchedRequest, *, now_s: float) -> GuardVerdict | None:
        """Take one request; the verdict where it shows harm. now_s: wall clock, for the record."""
        assert self.verdict is None, "the guard is over"
        for name, difference in self._differences(request):
            detector = self.detectors[name]
            detector.observe(difference)
            if detector.evidence >= self.threshold:
                self.verdict = self._verdict(name, detector, now_s)
                return self.verdict
        return None

    def forget_aged(self) -> None:
        """What was seen of older drafts' KV: it is no longer what requests stand on."""
        self.detectors["aged"] = self._aged()

    def _differences(self, request: WatchedRequest) -> list[tuple[DetectorName, float]]:
        found: list[tuple[DetectorName, float]] = []
        live, expected = request.live, request.expected
        if request.age == "excluded" or not (live and expected and live.steps and expected.steps):
            self.num_excluded += 1
        else:
            found.append((request.age, live.accept_length - expected.accept_length))
        shadow, parent = request.shadow, request.parent
        if shadow and parent and shadow.steps and parent.steps and self._is_new(request.group):
            found.append(("quality", shadow.accept_length - parent.accept_length))
        return found

    def _is_new(self, group: bytes) -> bool:
        """Remember a conversation; False where it counted lately."""
        if group in self._groups:
            self._groups.move_to_end(group)
            self.num_repeated += 1
            return False
        self._groups[group] = None
        if len(self._groups) > _MAX_GROUPS:
            self._groups.popitem(last=False)
        return True

    def _verdict(self, name: DetectorName, detector: Detector, now_s: float) -> GuardVerdict:
        is_quality = name == "quality"
        what = (
            "its parent's on the same requests" if is_quality else f"what its published weights say ({name} requests)"
        )
        recent = (
            f"{detector.recent_mean_tokens:+.3f} tokens over the last {min(detector.num_requests, _RECENT)} requests"
        )
        return GuardVerdict(
            harm="quality" if is_quality else "integrity",
            detector=name,
            reason=f"accept length of version {self.version} against {what}: {recent}, tolerated"
            f" -{detector.tolerance_tokens:g}",
            version=self.version,
            parent_version=self.parent_version,
            evidence=detector.evidence,
            threshold=self.threshold,
            num_requests=detector.num_requests,
            mean_tokens=detector.mean_tokens,
            recent_mean_tokens=detector.recent_mean_tokens,
            tolerance_tokens=detector.tolerance_tokens,
            num_excluded=self.num_excluded,
            num_repeated=self.num_repeated,
            decided_at_s=now_s,
        )
