"""`onlinespec bench accept`: accept length and latency of any running server, on given suites.

A grid of cells, suite by concurrency by temperature, one after the other. What is measured is kept whatever ends it:
the last request, Ctrl-C, or the server.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from onlinespec.bench.client import Answer, Prompt, Sampling, converse
from onlinespec.bench.plot import plot
from onlinespec.bench.provenance import Provenance, provenance
from onlinespec.bench.result import Cell, Result, Sample, Settings, Suite, begin, write_result
from onlinespec.bench.suites import load_suite
from onlinespec.bench.summary import table
from onlinespec.errors import BenchError

SAVE_S = 30.0
PROBE_S = 30.0
TIMEOUT_S = 600
INTERRUPTED = 130


@dataclass(frozen=True)
class Plan:
    """What `bench accept` was asked for. path: of the JSON, its plot beside it; None writes nothing."""

    base_url: str
    suites: Sequence[str]
    num_prompts: int
    """conversations of each suite"""
    concurrencies: Sequence[int]
    temperatures: Sequence[float]
    max_tokens: int
    seed: int
    is_streamed: bool
    num_warmup: int
    is_flushed: bool
    run_dir: Path | None
    path: Path | None


def run_accept(plan: Plan, console: Console) -> int:
    """Measure what the file does not hold yet, show and write it; the exit status.

    Raises: BenchError where nothing can be asked as wanted, or the server is lost; what was measured is written then.
    """
    suites = {source: load_suite(source, plan.num_prompts, plan.seed) for source in plan.suites}
    settings = Settings(
        base_url=plan.base_url.rstrip("/"),
        model=asyncio.run(_model(plan.base_url)),
        suites=[Suite.of(source, prompts) for source, prompts in suites.items()],
        concurrencies=list(dict.fromkeys(plan.concurrencies)),
        temperatures=list(dict.fromkeys(plan.temperatures)),
        max_tokens=plan.max_tokens,
        seed=plan.seed,
        is_streamed=plan.is_streamed,
        num_warmup=plan.num_warmup,
        is_flushed=plan.is_flushed,
    )
    result = begin(plan.path, settings)
    session = provenance(plan.base_url, plan.run_dir)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        try:
            for cell in result.cells:
                Measurement(result, cell, plan.path, session).run(suites[cell.suite], progress)
            status = 0 if all(any(not sample.error for sample in cell.samples) for cell in result.cells) else 1
        except KeyboardInterrupt:
            status = INTERRUPTED
        finally:
            progress.stop()
            _show(result, plan.path, console)
    return status


class Measurement:
    """Fills one cell; `result`, of which it is, is written to `path` as it goes, and says which sessions did so."""

    def __init__(self, result: Result, cell: Cell, path: Path | None, session: Provenance):
        self._result, self._cell, self._path, self._session = result, cell, path, session
        self._began_s = 0.0
        self._saved_s = time.monotonic()

    def run(self, prompts: Sequence[Prompt], progress: Progress) -> None:
        """Ask what is missing in it. A conversation that failed, or was broken off, is asked again from its start."""
        missing = self._keep_whole(prompts)
        total = sum(1 + len(prompt.follow_ups) for prompt in prompts)
        bar = progress.add_task(self._cell.name, total=total, completed=len(self._cell.samples))
        if not missing:
            self._cell.is_complete = True
            return
        if not any(session is self._session for session in self._result.sessions):  # two of a second may be equal
            self._result.sessions.append(self._session)
        settings, cell = self._result.settings, self._cell
        sampling = Sampling(cell.temperature, settings.max_tokens, seed=settings.seed, is_streamed=settings.is_streamed)
        warmup = [Prompt.of_text("", f"Count from {n} to {n + 40}.") for n in range(settings.num_warmup)]
        asyncio.run(drive(settings.base_url, warmup, sampling, cell.concurrency))
        if settings.is_flushed:
            _flush(settings.base_url)
        self._began_s = time.monotonic() - max((kept.sent_s + kept.done_s for kept in cell.samples), default=0.0)

        def take(answer: Answer) -> None:
            cell.samples.append(Sample.of(answer, self._began_s))
            progress.advance(bar)
            if time.monotonic() - self._saved_s > SAVE_S:
                self._save()

        try:
            asyncio.run(drive(settings.base_url, missing, sampling, cell.concurrency, take))
            cell.is_complete = True
        finally:
            self._save()

    def _keep_whole(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Keep the samples of the conversations that are whole; the prompts of the others."""
        turns: dict[int, int] = {}
        for sample in self._cell.samples:
            turns[sample.number] = turns.get(sample.number, 0) + (not sample.error)
        missing = [prompt for prompt in prompts if turns.get(prompt.number, 0) <= len(prompt.follow_ups)]
        again = {prompt.number for prompt in missing}
        self._cell.samples = [sample for sample in self._cell.samples if sample.number not in again]
        return missing

    def _save(self) -> None:
        self._cell.summarise()
        if self._path is not None:
            write_result(self._path, self._result)
        self._saved_s = time.monotonic()


async def drive(
    base_url: str,
    prompts: Iterable[Prompt],
    sampling: Sampling,
    concurrency: int,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> list[Answer]:
    """Hold the conversations with so many users at a time; answers in the order their conversations ended.

    Raises: BenchError where the server does not answer, at first or any more; what `on_answer` was told stays.
    """
    answers: list[Answer] = []
    waiting = iter(prompts)
    async with _client(base_url) as client:
        model = await _first_model(client, base_url)

        async def user() -> None:
            for prompt in waiting:
                told = await converse(client, model, prompt, sampling)
                answers.extend(told)
                for answer in told:
                    on_answer(answer)
                if told[-1].is_cut:
                    await _check_alive(client, base_url, told[-1])

        users = [asyncio.create_task(user()) for _ in range(concurrency)]
        try:
            await asyncio.gather(*users)
        finally:
            for task in users:
                task.cancel()
            await asyncio.gather(*users, return_exceptions=True)
    return answers


def _client(base_url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{base_url.rstrip('/')}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)


async def _model(base_url: str) -> str:
    async with _client(base_url) as client:
        return await _first_model(client, base_url)


async def _first_model(client: openai.AsyncOpenAI, base_url: str) -> str:
    try:
        return (await client.models.list()).data[0].id
    except openai.OpenAIError as error:
        raise BenchError(f"{base_url}: {error}; is the server running, and is this its address?") from error


async def _check_alive(client: openai.AsyncOpenAI, base_url: str, answer: Answer) -> None:
    try:
        await client.models.list(timeout=PROBE_S)
    except openai.OpenAIError as error:
        raise BenchError(
            f"{base_url}: the server is gone, in the middle of a request ({answer.error}); start it again and give the"
            " same command to go on"
        ) from error


def _flush(base_url: str) -> None:
    try:
        reply = httpx.post(f"{base_url}/flush_cache", timeout=PROBE_S)
        refused = "" if reply.status_code == httpx.codes.OK else f"{reply.status_code} {reply.text.strip()}"
    except httpx.HTTPError as error:
        refused = str(error)
    if refused:
        raise BenchError(f"{base_url}: did not flush its cache: {refused}; measure without --flush-cache")


def _show(result: Result, path: Path | None, console: Console) -> None:
    """Tables of what was measured, what was missing in it, and where it was written."""
    samples = [sample for cell in result.cells for sample in cell.samples]
    for cell in result.cells:
        if cell.rows:
            console.print(table(cell.rows, cell.name + ("" if cell.is_complete else ", not complete")))
    errors = [sample.error for sample in samples if sample.error]
    if errors:
        console.print(f"{len(errors)} requests failed, the first with: {errors[0]}")
    if samples and not any(sample.has_counters for sample in samples):
        console.print("no accept length: the server sent no counters; is speculation on, and is it SGLang >= 0.5.23?")
    is_complete = all(cell.is_complete for cell in result.cells)
    if not is_complete:
        console.print(f"not complete: {len(samples) - len(errors)} requests were measured")
    if path is not None and samples:
        write_result(path, result)
        plot(result, path.with_suffix(".png"))
        again = "" if is_complete else "; the same command goes on with it"
        console.print(f"written to {path}, with a plot beside it{again}")
