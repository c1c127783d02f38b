"""In which order recorded requests come again: the four kinds of stream, from the same recordings, by seed.

Every request is used once at most, in an order shuffled by the seed, and is given the time at which a server of the
recordings' rate would have answered it: requests end one after another, each as long after the one before as its
answer tokens take, and began as long before as they did when recorded.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from onlinespec.draft.sample import Sample
from onlinespec.errors import BenchError

Scheduled = tuple[str, Sample]
"""domain and request"""
ORDERS = ("abrupt", "gradual", "recurring", "bursts")
_ROUNDS = 2
"""A/B/A/B"""
_BURST_REQUESTS = 16
"""mean length of a tenant's burst"""


def schedule(
    order: str, pools: Mapping[str, Sequence[Sample]], tokens_per_domain: int, tokens_per_s: float, seed: int
) -> list[Scheduled]:
    """The stream: `tokens_per_domain` answer tokens times the number of domains, in the mean so many of each.

    In `bursts` each domain is a tenant of its own. Raises: BenchError where the recordings hold too few requests.
    """
    rng = random.Random(f"{order}/{seed}")
    domains = list(pools)
    waiting = {domain: iter(rng.sample(list(pool), len(pool))) for domain, pool in pools.items()}
    total = tokens_per_domain * len(domains)
    next_domain = _COURSES[order](domains, total, rng)
    stream: list[Scheduled] = []
    num_tokens = 0
    while num_tokens < total:
        domain = next_domain(num_tokens)
        sample = next(waiting[domain], None)
        if sample is None:
            have = sum(sample.num_answer_tokens for sample in pools[domain])
            raise BenchError(
                f"the recordings of {domain} hold {have} answer tokens to train on, too few for order {order} of "
                f"{tokens_per_domain} a domain; record more, or lower --tokens"
            )
        num_tokens += sample.num_answer_tokens
        ended_s = num_tokens / tokens_per_s
        started_s = ended_s - (sample.ended_s - sample.started_s)
        tenant = domain if order == "bursts" else sample.tenant
        stream.append((domain, replace(sample, tenant=tenant, started_s=started_s, ended_s=ended_s)))
    return stream


def _abrupt(domains: Sequence[str], total: int, rng: random.Random) -> Callable[[int], str]:
    return lambda num_tokens: domains[num_tokens * len(domains) // total]


def _gradual(domains: Sequence[str], total: int, rng: random.Random) -> Callable[[int], str]:
    """From each domain to the next with a chance that rises linearly."""

    def next_domain(num_tokens: int) -> str:
        place = num_tokens / total * (len(domains) - 1)
        is_later = rng.random() < place - int(place)
        return domains[int(place) + is_later]

    return next_domain


def _recurring(domains: Sequence[str], total: int, rng: random.Random) -> Callable[[int], str]:
    slots = [*domains] * _ROUNDS
    return lambda num_tokens: slots[num_tokens * len(slots) // total]


def _bursts(domains: Sequence[str], total: int, rng: random.Random) -> Callable[[int], str]:
    """Bursts of geometric length, each of another tenant than the one before."""
    current = domains[0]

    def next_domain(num_tokens: int) -> str:
        nonlocal current
        if num_tokens and rng.random() < 1 / _BURST_REQUESTS:
            current = rng.choice([domain for domain in domains if domain != current])
        return current

    return next_domain


_COURSES = dict(zip(ORDERS, (_abrupt, _gradual, _recurring, _bursts), strict=True))


def tokens_per_s(recording: Sequence[Sample]) -> float:
    """Answer tokens a second of one recording, from its first start to its last end."""
    span_s = max(sample.ended_s for sample in recording) - min(sample.started_s for sample in recording)
    return sum(sample.num_answer_tokens for sample in recording) / max(span_s, 1e-9)
