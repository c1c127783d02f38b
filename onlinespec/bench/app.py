"""The `onlinespec bench` commands: thin, as cli.py is. What they run is imported inside them: help stays light."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Measure a running server.")

SUITES = (
    "`demo`, `demo:DOMAIN`, a JSONL file of prompts, or NAME:PATH with NAME one of mtbench, gsm8k, humaneval, math500,"
    " sharegpt, sharegpt-turns; may be given several times."
)


@app.command()
def accept(
    base_url: Annotated[str, typer.Option(help="Address of the server, without /v1.")] = "http://127.0.0.1:30000",
    suite: Annotated[list[str] | None, typer.Option(help=SUITES, show_default="demo")] = None,
    requests: Annotated[int, typer.Option(help="Conversations of each suite.", min=1)] = 100,
    concurrency: Annotated[
        list[int] | None, typer.Option(help="Users at a time; may be given several times.", min=1, show_default="4")
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="May be given several times.", min=0.0, show_default="0")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 256,
    seed: Annotated[int, typer.Option(help="Of the prompts that are drawn, and of sampling.")] = 1,
    stream: Annotated[bool, typer.Option(help="Without a stream there are no latencies between tokens.")] = True,
    warmup: Annotated[int, typer.Option(help="Requests before each cell that are not counted.", min=0)] = 4,
    flush_cache: Annotated[
        bool,
        typer.Option(
            "--flush-cache", help="Empty the server's prefix cache before each cell: all ask the same prompts."
        ),
    ] = False,
    run_dir: Annotated[
        Path | None, typer.Option(help="The server's, if it is ours: its config's digest is kept.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Where the result goes, a plot beside it; one begun there is gone on with.")
    ] = None,
) -> None:
    """Accept length, acceptance by position, tokens/s, TTFT and inter-token latency.

    Of every suite at every concurrency and temperature. Ctrl-C keeps what was measured.
    """
    from rich.console import Console

    from onlinespec.bench.accept import Plan, run_accept

    plan = Plan(
        base_url=base_url,
        suites=suite or ["demo"],
        num_prompts=requests,
        concurrencies=concurrency or [4],
        temperatures=temperature or [0.0],
        max_tokens=max_tokens,
        seed=seed,
        is_streamed=stream,
        num_warmup=warmup,
        is_flushed=flush_cache,
        run_dir=run_dir,
        path=json,
    )
    raise typer.Exit(run_accept(plan, Console()))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Result of `bench accept`: what is compared with.")],
    b: Annotated[Path, typer.Argument(help="Result of `bench accept` with the same suites and settings.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Differences of B from A, conversation by conversation, with 95 % intervals."""
    from rich.console import Console

    from onlinespec.bench.compare import compare, compare_table, to_json

    found = compare(a, b)
    if as_json:
        typer.echo(to_json(found))
    else:
        Console().print(compare_table(found))
