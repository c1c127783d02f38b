"""The `onlinespec bench` commands: thin, as cli.py is. What they run is imported inside them: help stays light."""

import os
from pathlib import Path
from typing import Annotated

import typer

ConfigFiles = Annotated[list[Path] | None, typer.Option("--config", help="YAML file; may be given several times.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.field=value; may be given several times.")]
Users = Annotated[int, typer.Option(help="Users at a time.", min=1)]
Target = Annotated[str, typer.Option(help="A model directory or Hugging Face id; `demo`: the demo world's.")]
DEMO = "demo"
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


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def stream(
    context: typer.Context,
    json: Annotated[Path, typer.Option(help="Where the result goes; the same command goes on where it ends.")],
    replay: Annotated[list[str] | None, typer.Option(help="Recordings, [DOMAIN=]DIRECTORY each. None: live.")] = None,
    target: Target = DEMO,
    draft: Annotated[str, typer.Option(help="Directory, `init`; in a replay `first`: fits the first domain.")] = "init",
    arms: Annotated[str, typer.Option(help="Separated by semicolons; settings may follow a name.")] = "",
    orders: Annotated[str, typer.Option(help="Replay: abrupt,gradual,recurring,bursts or some.")] = "abrupt",
    seeds: Annotated[int, typer.Option(help="Replay: 0 to this, less one.", min=1)] = 5,
    tokens: Annotated[int, typer.Option(help="Replay: answer tokens of each domain.", min=100)] = 32_000,
    oracle_passes: Annotated[int, typer.Option(help="Replay: over a domain, for its oracle.", min=1)] = 3,
    jobs: Annotated[int, typer.Option(help="Replay: rows played at once. 0: one a core.", min=0)] = 0,
    phase: Annotated[list[str] | None, typer.Option(help="Live: suites as for `accept`, in order.")] = None,
    requests: Annotated[int, typer.Option(help="Live: of each phase.", min=2)] = 300,
    concurrency: Users = 4,
    max_tokens: Annotated[int, typer.Option(help="Live.", min=2)] = 200,
    window: Annotated[int, typer.Option(help="Live: answers that are compared as one.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Live: of the demo's prompts.")] = 1,
    draft_steps: Annotated[int, typer.Option(help="Draft tokens per verify step.", min=1, max=8)] = 3,
    config: ConfigFiles = None,
    override: Overrides = None,
) -> None:
    """How fast accept length comes back after traffic moved: onlinespec beside a frozen draft and the usual recipe.

    Live, each arm has a server of its own, one after another; other flags go to SGLang as they are. With --replay,
    recorded requests come again: more arms, orders and seeds, without a server.
    """
    from rich.console import Console

    from onlinespec.bench.replay_jobs import ReplayPlan
    from onlinespec.bench.replay_run import run_replay
    from onlinespec.bench.stream_run import LivePlan, run_live

    names = tuple(arms.split(";")) if arms else ()
    settings = tuple(config or ()), tuple(override or ())
    if replay and context.args:
        raise typer.BadParameter(f"{context.args[0]}: a replay has no server to give it to")
    if replay:
        chosen = (names, tuple(orders.split(",")), tuple(range(seeds)), tokens, draft_steps, oracle_passes)
        at_once = jobs or os.cpu_count() or 1
        plan = ReplayPlan(tuple(replay), _model(target), json, draft, *chosen, *settings, at_once)
        has_ended = run_replay(plan, Console())
    else:
        suites = tuple(phase or ("demo:code", "demo:support"))
        sent = (suites, requests, concurrency, max_tokens, seed, window, draft_steps)
        live = LivePlan(json, _model(target), draft, names, *sent, *settings, flags=tuple(context.args))
        has_ended = run_live(live, Console())
    raise typer.Exit(0 if has_ended else 1)


def _model(target: str) -> Path:
    from onlinespec.provision import resolve_model
    from onlinespec.world import WORLD

    return WORLD if target == DEMO else resolve_model(target)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def overhead(
    context: typer.Context,
    json: Annotated[
        Path, typer.Option(help="Where the result goes, a plot beside it; one begun there is gone on with.")
    ],
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Of a running `onlinespec serve`; left out, one is started.")
    ] = None,
    target: Target = DEMO,
    draft: Annotated[str, typer.Option(help="Of the server that is started.")] = "init",
    suite: Annotated[str, typer.Option(help="As for `accept`.")] = "demo",
    pairs: Annotated[int, typer.Option(help="Of blocks: each has all three states.", min=2)] = 20,
    block_seconds: Annotated[float, typer.Option(help="Of one block.", min=1.0)] = 8.0,
    swaps: Annotated[int, typer.Option(help="Of the draft in service for itself, for their gaps.", min=0)] = 20,
    concurrency: Users = 4,
    max_tokens: Annotated[int, typer.Option(min=2)] = 200,
    config: ConfigFiles = None,
    override: Overrides = None,
) -> None:
    """What the tap, and training beside it, cost: tokens/s and token gaps of one server, switched in ABBA blocks.

    The server's draft stays pinned meanwhile. A given server is left as it was; of one that is started, other flags go
    to SGLang as they are.
    """
    from rich.console import Console

    from onlinespec.bench.overhead_run import OverheadPlan, run_overhead

    if run_dir and context.args:
        raise typer.BadParameter(f"{context.args[0]}: the server of --run-dir runs already; give it to `serve`")
    plan = OverheadPlan(
        out=json,
        run_dir=run_dir,
        target=_model(target),
        draft=draft,
        suite=suite,
        num_pairs=pairs,
        block_s=block_seconds,
        num_swaps=swaps,
        num_users=concurrency,
        max_tokens=max_tokens,
        config_files=tuple(config or ()),
        overrides=tuple(override or ()),
        flags=tuple(context.args),
    )
    raise typer.Exit(0 if run_overhead(plan, Console()) else 1)
