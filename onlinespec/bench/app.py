"""The `onlinespec bench` commands: thin, as cli.py is. What they run is imported inside them: help stays light."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Measure a running server.")


@app.command()
def accept(
    base_url: Annotated[str, typer.Option(help="Address of the server, without /v1.")] = "http://127.0.0.1:30000",
    suite: Annotated[str, typer.Option(help="`demo`, `demo:DOMAIN`, or a JSONL file of prompts.")] = "demo",
    requests: Annotated[int, typer.Option(help="Prompts to send.", min=1)] = 100,
    concurrency: Annotated[int, typer.Option(help="Users at a time.", min=1)] = 4,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    seed: Annotated[int, typer.Option(help="Of the demo's prompts.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Where to write the result as JSON.")] = None,
) -> None:
    """Accept length, acceptance by position, tokens/s, TTFT and inter-token latency."""
    from rich.console import Console
    from rich.progress import track

    from onlinespec.bench.accept import drive, report, summaries_of, write_report
    from onlinespec.bench.client import Answer, Sampling
    from onlinespec.bench.suites import load_suite
    from onlinespec.bench.summary import table

    console = Console()
    prompts = load_suite(suite, requests, seed)
    bar = iter(track(range(len(prompts)), "requests", console=Console(stderr=True)))
    next(bar, None)

    def advance(_answer: Answer) -> None:
        next(bar, None)

    sampling = Sampling(temperature=temperature, max_tokens=max_tokens)
    answers = asyncio.run(drive(base_url, prompts, sampling, concurrency, advance))
    rows = summaries_of(answers)
    console.print(table(rows, f"{suite} on {base_url}, {concurrency} users"))
    if any(answer.error for answer in answers):
        console.print("first error: " + next(answer.error for answer in answers if answer.error))
    if not any(answer.has_counters for answer in answers):
        console.print("the server sent no speculative counters; is speculation on, and is it SGLang >= 0.5.23?")
    if out is not None:
        settings = {"suite": suite, "concurrency": concurrency, "temperature": temperature, "seed": seed}
        write_report(out, report(rows, {**settings, "base_url": base_url, "max_tokens": max_tokens}))
        console.print(f"written to {out}")
