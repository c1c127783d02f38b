"""One conversation through the `openai` client, timed, with SGLang's own speculative counters.

`extra_body={"return_spec_tokens_details": true}` brings the counters, streaming or not (SGLang 0.5.23
entrypoints/openai/protocol.py SglExt); a server that does not know the field, or does not speculate, gives none and
says so in `Answer.has_counters`. Above temperature 0 a seed is sent with each request; SGLang keeps to it where it
samples deterministically (`--enable-deterministic-inference`), elsewhere it changes nothing.
"""

import time
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import openai


@dataclass(frozen=True)
class Prompt:
    """What one user sends. domain labels the row of the table it counts in.

    follow_ups are the user's later turns, each asked behind the model's own answer to the turn before. number is the
    conversation's place in its suite; -1 where it is of none, and then it is a conversation of its own.
    """

    domain: str
    messages: tuple[dict[str, str], ...]
    follow_ups: tuple[str, ...] = ()
    number: int = field(default=-1, compare=False)
    turn: int = field(default=0, compare=False)

    @classmethod
    def of_text(cls, domain: str, text: str) -> "Prompt":
        return cls(domain, ({"role": "user", "content": text},))

    def after(self, text: str) -> "Prompt":
        """The next turn, when the answer to this one was `text`."""
        told = ({"role": "assistant", "content": text}, {"role": "user", "content": self.follow_ups[0]})
        return replace(self, messages=self.messages + told, follow_ups=self.follow_ups[1:], turn=self.turn + 1)


@dataclass
class Answer:
    """What came back. Times in seconds of the client's monotonic clock; error is empty where it succeeded.

    chunk_s, chunk_tokens: when each chunk of a stream came, and how many tokens there were with it; empty where it was
    not streamed. histogram[j]: verify steps with exactly j drafted tokens accepted. is_cut: the connection failed.
    """

    prompt: Prompt
    sent_s: float
    text: str = ""
    chunk_s: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    done_s: float = 0.0
    finish_reason: str = ""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_verify_steps: int = 0
    num_correct_drafts: int = 0
    histogram: list[int] = field(default_factory=list)
    has_counters: bool = False
    error: str = ""
    is_cut: bool = False

    @property
    def domain(self) -> str:
        return self.prompt.domain

    @property
    def ttft_s(self) -> float:
        return self.chunk_s[0] - self.sent_s

    @property
    def end_s(self) -> float:
        """When its last token came."""
        return self.chunk_s[-1] if self.chunk_s else self.done_s

    @property
    def gaps_s(self) -> list[tuple[float, float]]:
        """(when it ended, how long) of each pause between two chunks."""
        return [(b, b - a) for a, b in zip(self.chunk_s, self.chunk_s[1:], strict=False)]

    @property
    def token_gaps_s(self) -> list[float]:
        """Inter-token latency of each token after the first chunk: the pause before its chunk over the chunk's tokens.

        Source: SGLang 0.5.23 benchmark/serving.py, `adjust_itl`. Empty where the server does not count as it streams.
        """
        if len(self.chunk_tokens) != len(self.chunk_s):
            return []
        counts = [b - a for a, b in zip(self.chunk_tokens, self.chunk_tokens[1:], strict=False)]
        return [gap / count for (_, gap), count in zip(self.gaps_s, counts, strict=True) for _ in range(count)]


@dataclass(frozen=True)
class Sampling:
    """How answers are made. tenant labels the request for the gate's held-out hash; empty sends none."""

    temperature: float = 0.0
    max_tokens: int = 256
    tenant: str = ""
    seed: int = 0
    is_streamed: bool = True


async def converse(client: openai.AsyncOpenAI, model: str, prompt: Prompt, sampling: Sampling) -> list[Answer]:
    """Ask all turns of a conversation; the answers, one a turn, up to the first that failed."""
    answers = [await ask(client, model, prompt, sampling)]
    while prompt.follow_ups and not answers[-1].error:
        prompt = prompt.after(answers[-1].text)
        answers.append(await ask(client, model, prompt, sampling))
    return answers


async def ask(client: openai.AsyncOpenAI, model: str, prompt: Prompt, sampling: Sampling) -> Answer:
    """Send one prompt and take its answer. A failed request is an answer with `error` set, never an exception.

    What fails inside a stream is httpx's error, not the client's own (openai 2.8.0 _streaming.py AsyncStream).
    """
    answer = Answer(prompt, time.monotonic())
    pieces: list[str] = []
    try:
        reply: Any = await client.chat.completions.create(**_request(model, prompt, sampling))
        if sampling.is_streamed:
            async for chunk in reply:
                _take_chunk(chunk, answer, pieces)
        else:
            _take_whole(reply, answer, pieces)
    except (openai.OpenAIError, httpx.HTTPError) as error:
        answer.error = f"{type(error).__name__}: {error}"
        answer.is_cut = isinstance(error, openai.APIConnectionError | httpx.HTTPError)
    answer.done_s = time.monotonic()
    answer.text = "".join(pieces)
    if not answer.error and not answer.finish_reason:
        answer.error, answer.is_cut = "the stream ended without a finish reason", True
    return answer


def _request(model: str, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
    extra: dict[str, Any] = {"return_spec_tokens_details": True}
    if sampling.tenant:
        extra["custom_params"] = {"onlinespec": {"tenant": sampling.tenant}}
    request = {
        "model": model,
        "messages": list(prompt.messages),
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "extra_body": extra,
    }
    if sampling.temperature > 0:
        request["seed"] = sampling.seed
    if sampling.is_streamed:
        request |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    return request


def _take_chunk(chunk: Any, answer: Answer, pieces: list[str]) -> None:
    for choice in chunk.choices:
        if choice.delta.content or (choice.delta.model_extra or {}).get("reasoning_content"):
            answer.chunk_s.append(time.monotonic())
            pieces.append(choice.delta.content or "")
            if chunk.usage is not None:
                answer.chunk_tokens.append(chunk.usage.completion_tokens)
        answer.finish_reason = choice.finish_reason or answer.finish_reason
    _take_counts(chunk, answer)


def _take_whole(completion: Any, answer: Answer, pieces: list[str]) -> None:
    (choice,) = completion.choices
    pieces.append(choice.message.content or "")
    answer.finish_reason = choice.finish_reason
    _take_counts(completion, answer)


def _take_counts(reply: Any, answer: Answer) -> None:
    if reply.usage is not None:
        answer.num_prompt_tokens = reply.usage.prompt_tokens
        answer.num_output_tokens = reply.usage.completion_tokens
    details = ((reply.model_extra or {}).get("sglext") or {}).get("spec_tokens_details")
    if details:
        details = details[0] if isinstance(details, list) else details
        answer.has_counters = True
        answer.num_verify_steps = details["spec_verify_ct"]
        answer.num_correct_drafts = details["spec_num_correct_drafts"]
        answer.histogram = details["spec_correct_drafts_histogram"]
