"""How far the live server lags behind the shadow on draft KV that older drafts left, and when to compute it anew.

After a swap the prefix cache still holds the draft KV of older drafts. What is cached once and asked for by every
request (a system prompt, a chat template's first tokens) is never evicted, so it is never replaced either: it stays
the work of the draft that saw it first. Where drafts differ much, as while an untrained one learns, that costs half a
token a step. Nothing is wrong with the draft in service, and no older one would do better on that KV.

So the remedy is not a rollback: requests from then on are told apart from those before (SGLang's `extra_key`), and
what they share is computed once more, by the draft of the day. Nothing is flushed, and what running requests use stays
until it is evicted. That costs a prefill of each prefix that is still in use, so it is done where a loss was seen, and
at most once a version. A decision by a plain mean: it risks a prefill, no answer and no version.
"""

import math
from collections import deque

NUM_REQUESTS = 32


class Lag:
    """tolerance_tokens: mean loss that is borne; 0 bears any. Memory: 32 numbers."""

    def __init__(self, tolerance_tokens: float):
        self.renewed_s = -math.inf
        """when prefixes were last computed anew; what began earlier says nothing of what is cached now"""
        self._tolerance_tokens = tolerance_tokens
        self._renewed_version: int | None = None
        self._recent: deque[float] = deque(maxlen=NUM_REQUESTS)

    @property
    def mean_tokens(self) -> float:
        """Live minus shadow over the last requests that stand on older drafts' KV, whichever draft served them."""
        return math.fsum(self._recent) / max(len(self._recent), 1)

    def observe(self, difference_tokens: float) -> None:
        """Take one such request's live minus shadow accept length."""
        self._recent.append(difference_tokens)

    def is_due(self, version: int) -> bool:
        """Whether prefixes should be computed anew while this version is in service."""
        is_known = len(self._recent) == NUM_REQUESTS and self._renewed_version != version
        return is_known and 0.0 < self._tolerance_tokens < -self.mean_tokens

    def renewed(self, version: int, now_s: float | None) -> None:
        """It was done; None where it was refused. Not again for this version."""
        self._renewed_version = version
        if now_s is not None:
            self.renewed_s = now_s
            self._recent.clear()
