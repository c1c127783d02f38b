"""`onlinespec bench accept`: accept length and latency of any running server, on given prompts."""

import asyncio
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import openai

import onlinespec
from onlinespec.bench.client import Answer, Prompt, Sampling, ask
from onlinespec.bench.summary import Summary, summarise
from onlinespec.errors import BenchError


async def drive(
    base_url: str,
    prompts: Iterable[Prompt],
    sampling: Sampling,
    concurrency: int,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> list[Answer]:
    """Send the prompts with so many users at a time; answers in the order they ended.

    Raises: BenchError where the server does not answer at all.
    """
    client = openai.AsyncOpenAI(base_url=f"{base_url.rstrip('/')}/v1", api_key="none", max_retries=0, timeout=600)
    answers: list[Answer] = []
    waiting = iter(prompts)
    async with client:
        try:
            model = (await client.models.list()).data[0].id
        except openai.OpenAIError as error:
            raise BenchError(f"{base_url}: {error}; is the server running, and is this its address?") from error

        async def user() -> None:
            for prompt in waiting:
                answer = await ask(client, model, prompt, sampling)
                answers.append(answer)
                on_answer(answer)

        await asyncio.gather(*(user() for _ in range(concurrency)))
    return answers


def summaries_of(answers: Sequence[Answer]) -> list[Summary]:
    """One row per domain, in order of first appearance, and the total."""
    domains = list(dict.fromkeys(answer.domain for answer in answers))
    rows = [summarise(domain, [a for a in answers if a.domain == domain]) for domain in domains]
    return [*rows, summarise("all", answers)] if len(rows) > 1 else rows


def report(summaries: Sequence[Summary], settings: dict[str, object]) -> dict[str, object]:
    """JSON-able result with its provenance."""
    return {
        "kind": "bench accept",
        "onlinespec": onlinespec.__version__,
        "command": " ".join(["onlinespec", *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {"platform": platform.platform(), "python": platform.python_version()},
        "settings": settings,
        "rows": msgspec.to_builtins(list(summaries)),
    }


def write_report(path: Path, result: dict[str, object]) -> None:
    path.write_text(json.dumps(result, indent=2) + "\n")
