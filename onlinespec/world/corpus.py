"""Requests and reference answers of the demo's world, endless and from a seed.

Training text and live traffic come from the same generators but from
generators seeded with different strings, so a live prompt can equal a
training prompt only by chance; `quality` measures how often it does.
"""

import random
from collections.abc import Iterator

from onlinespec.world.domains import GENERATORS, Conversation

DOMAINS: tuple[str, ...] = tuple(GENERATORS)
FIRST_DOMAIN = "code"
SHIFT_DOMAIN = "support"


def conversation(domain: str, rng: random.Random) -> Conversation:
    """Return the next request of a domain, with its reference answer.

    Raises: ValueError if the domain is not one of DOMAINS.
    """
    if domain not in GENERATORS:
        raise ValueError(f"unknown domain {domain!r}; expected one of {', '.join(DOMAINS)}")
    return GENERATORS[domain](rng)


def live(domain: str, seed: int) -> Iterator[Conversation]:
    """Yield live requests with their reference answers, without end.

    Raises: ValueError if the domain is not one of DOMAINS.
    """
    rng = random.Random(f"live/{domain}/{seed}")
    while True:
        yield conversation(domain, rng)


def prompts(domain: str, seed: int) -> Iterator[str]:
    """Yield live user messages, without end.

    Raises: ValueError if the domain is not one of DOMAINS.
    """
    return (request.user for request in live(domain, seed))


def training(seed: int) -> Iterator[Conversation]:
    """Yield the training corpus, without end; domains are drawn evenly."""
    rng = random.Random(f"train/{seed}")
    while True:
        yield conversation(rng.choice(DOMAINS), rng)
