"""One request through the `openai` client, timed, with SGLang's own speculative counters.

`extra_body={"return_spec_tokens_details": true}` brings the counters in the streaming path (SGLang 0.5.23
entrypoints/openai/protocol.py SglExt); a server that does not know the field gives none and says so in
`Answer.has_counters`.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import openai


@dataclass(frozen=True)
class Prompt:
    """What one user sends. domain labels the row of the table it counts in."""

    domain: str
    messages: tuple[dict[str, str], ...]

    @classmethod
    def of_text(cls, domain: str, text: str) -> "Prompt":
        return cls(domain, ({"role": "user", "content": text},))


@dataclass
class Answer:
    """What came back. Times in seconds of the client's monotonic clock; error is empty where it succeeded.

    histogram[j]: verify steps with exactly j drafted tokens accepted.
    """

    prompt: Prompt
    sent_s: float
    text: str = ""
    chunk_s: list[float] = field(default_factory=list)
    finish_reason: str = ""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_verify_steps: int = 0
    num_correct_drafts: int = 0
    histogram: list[int] = field(default_factory=list)
    has_counters: bool = False
    error: str = ""

    @property
    def domain(self) -> str:
        return self.prompt.domain

    @property
    def ttft_s(self) -> float:
        return self.chunk_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[tuple[float, float]]:
        """(when it ended, how long) of each pause between two chunks."""
        return [(b, b - a) for a, b in zip(self.chunk_s, self.chunk_s[1:], strict=False)]


@dataclass(frozen=True)
class Sampling:
    """How answers are made. tenant labels the request for the gate's held-out hash; empty sends none."""

    temperature: float = 0.0
    max_tokens: int = 256
    tenant: str = ""


async def ask(client: openai.AsyncOpenAI, model: str, prompt: Prompt, sampling: Sampling) -> Answer:
    """Send one prompt and stream its answer. An API error is an answer with `error` set, never an exception."""
    answer = Answer(prompt, time.monotonic())
    extra: dict[str, Any] = {"return_spec_tokens_details": True}
    if sampling.tenant:
        extra["custom_params"] = {"onlinespec": {"tenant": sampling.tenant}}
    pieces: list[str] = []
    try:
        stream = await client.chat.completions.create(  # type: ignore[call-overload]
            model=model,
            messages=list(prompt.messages),
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        )
        async for chunk in stream:
            _take(chunk, answer, pieces)
    except openai.OpenAIError as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.text = "".join(pieces)
    if not answer.error and not answer.finish_reason:
        answer.error = "the stream ended without a finish reason"
    return answer


def _take(chunk: Any, answer: Answer, pieces: list[str]) -> None:
    for choice in chunk.choices:
        if choice.delta.content:
            answer.chunk_s.append(time.monotonic())
            pieces.append(choice.delta.content)
        answer.finish_reason = choice.finish_reason or answer.finish_reason
    if chunk.usage is not None:
        answer.num_prompt_tokens = chunk.usage.prompt_tokens
        answer.num_output_tokens = chunk.usage.completion_tokens
    extension = (chunk.model_extra or {}).get("sglext") or {}
    details = extension.get("spec_tokens_details")
    if details:
        details = details[0] if isinstance(details, list) else details
        answer.has_counters = True
        answer.num_verify_steps = details["spec_verify_ct"]
        answer.num_correct_drafts = details["spec_num_correct_drafts"]
        answer.histogram = details["spec_correct_drafts_histogram"]
