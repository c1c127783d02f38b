"""The demo's traffic: a few users at a time, one domain after the other, through the OpenAI API."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import openai

from onlinespec.bench.client import Answer, Prompt, Sampling, ask
from onlinespec.world.corpus import prompts

NUM_USERS = 4


@dataclass(frozen=True)
class Phase:
    """Traffic of one domain until so many answer tokens have come."""

    name: str
    domain: str
    num_tokens: int


@dataclass
class Record:
    """One answer with the phase it belongs to."""

    phase: str
    answer: Answer
    is_repeat: bool
    """its text occurred before in this run"""


@dataclass
class Traffic:
    """Sends phases and keeps every answer, in the order they ended."""

    base_url: str
    model: str
    sampling: Sampling
    seed: int
    records: list[Record] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)
    _streams: dict[str, Iterator[str]] = field(default_factory=dict)

    async def play(self, phase: Phase, on_answer: Callable[[Record], Awaitable[None]]) -> None:
        """Keep NUM_USERS requests in flight until the phase's tokens have come."""
        stream = self._streams.setdefault(phase.domain, prompts(phase.domain, self.seed))
        num_tokens = 0
        client = openai.AsyncOpenAI(base_url=f"{self.base_url}/v1", api_key="none", max_retries=0, timeout=600)

        async def user() -> None:
            nonlocal num_tokens
            for text in stream:
                if num_tokens >= phase.num_tokens:
                    return
                answer = await ask(client, self.model, Prompt.of_text(phase.domain, text), self.sampling)
                num_tokens += answer.num_output_tokens
                record = Record(phase.name, answer, answer.text in self._seen)
                self._seen.add(answer.text)
                self.records.append(record)
                await on_answer(record)

        async with client:
            await asyncio.gather(*(user() for _ in range(NUM_USERS)))
