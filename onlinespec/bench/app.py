"""The `onlinespec bench` commands: thin, as cli.py is. What they run is imported inside them: help stays light."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

ConfigFiles = Annotated[list[Path] | None, typer.Option("--config", help="YAML file; may be given several times.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.field=value; may be given several times.")]
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


@app.command()
def stream(
    out: Annotated[Path, typer.Option(help="JSON of the result; the same command goes on where it ends.")],
    replay: Annotated[
        list[str] | None,
        typer.Option(help="A recording, [DOMAIN=]DIRECTORY; may be given several times. Without: live."),
    ] = None,
    target: Annotated[str, typer.Option(help="A model directory or Hugging Face id; the demo world's.")] = "demo",
    draft: Annotated[
        str, typer.Option(help="A draft's directory, `init`, or, in a replay, `first`: one that fits the first domain.")
    ] = "init",
    arms: Annotated[str, typer.Option(help="Separated by semicolons; settings may follow a name.")] = "",
    orders: Annotated[str, typer.Option(help="Of a replay, separated by commas.")] = "abrupt",
    seeds: Annotated[int, typer.Option(help="Of a replay: 0 to this, less one.", min=1)] = 5,
    tokens: Annotated[int, typer.Option(help="Answer tokens of each domain.", min=100)] = 32_000,
    oracle_passes: Annotated[int, typer.Option(help="Passes over a domain that train its oracle.", min=1)] = 3,
    draft_steps: Annotated[int, typer.Option(help="Draft tokens per verify step.", min=1, max=8)] = 3,
    config: ConfigFiles = None,
    override: Overrides = None,
) -> None:
    """How fast accept length comes back after traffic moved: onlinespec beside a frozen draft and the usual recipe."""
    from rich.console import Console

    from onlinespec.bench.arms import REPLAY_ARMS
    from onlinespec.bench.replay_run import ReplayPlan, run_replay
    from onlinespec.provision import resolve_model
    from onlinespec.world import WORLD

    plan = ReplayPlan(
        recordings=tuple(replay or ()),
        target=WORLD if target == "demo" else resolve_model(target),
        out=out,
        draft=draft,
        arms=tuple(arms.split(";") if arms else REPLAY_ARMS),
        orders=tuple(orders.split(",")),
        seeds=tuple(range(seeds)),
        tokens_per_domain=tokens,
        num_draft_steps=draft_steps,
        oracle_passes=oracle_passes,
        config_files=tuple(config or ()),
        overrides=tuple(override or ()),
    )
    raise typer.Exit(0 if run_replay(plan, Console()) else 130)
