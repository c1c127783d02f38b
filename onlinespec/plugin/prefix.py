"""Keeps what is cached from now on apart from what older drafts cached, without a flush.

SGLang shares cached prefixes among requests of the same `extra_key`. Rank 0 adds a generation to the key of each
request before it is broadcast, so all ranks agree. A new generation shares nothing with those before, whose cached
prefixes are evicted in their turn. The first adds nothing: stock keys.

Source: SGLang 0.5.23, `RadixKey.extra_key` and `TokenizedGenerateReqInput.extra_key`; what SGLang does where the number
of expert ranks changes is the same (`Scheduler._maybe_namespace_elastic_radix_cache`).
"""

from collections.abc import Iterable
from typing import Any


class PrefixGeneration:
    """`renew` is called on the control thread, `name` on the scheduler's."""

    def __init__(self) -> None:
        self.number = 0

    def renew(self) -> None:
        self.number += 1

    def name(self, requests: Iterable[Any]) -> None:
        """Add the generation to the keys of these: tokenized requests, or batches of them; others have no key."""
        if not self.number:
            return
        for request in requests:
            for one in getattr(request, "batch", (request,)):
                if hasattr(one, "extra_key"):
                    # Behind the client's own: keys that were two stay two.
                    one.extra_key = f"{one.extra_key or ''}|draft {self.number}"
