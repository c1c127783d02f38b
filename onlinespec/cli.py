"""The command line: thin. Parse, load config, call one function, map errors to exit codes.

Exit codes: 0 fine; 1 an error of this package, one line on stderr; 2 wrong usage; `serve` exits with the
server's status.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from onlinespec.bench.app import app as bench_app
from onlinespec.errors import OnlinespecError
from onlinespec.explain import explain
from onlinespec.resolve import dump_config, load_config, resolve

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train the EAGLE-3 draft of a live SGLang server.")
app.add_typer(bench_app, name="bench")
config_app = typer.Typer(help="Print the config: `show`, the default, every value; `explain`, where each came from.")
app.add_typer(config_app, name="config")

RunDir = Annotated[Path, typer.Option("--run-dir", help="Run directory of the server.")]
ConfigFiles = Annotated[list[Path] | None, typer.Option("--config", help="YAML file; may be given several times.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.field=value; may be given several times.")]
Version = Annotated[int, typer.Argument(help="Number of a version in the store, as `history` shows it.")]
Reason = Annotated[
    str, typer.Option(help="Kept in the journal beside the order.", callback=lambda text: " ".join(text.split()))
]
DEFAULT_RUN_DIR = Path("runs/default")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Target: a model directory, or a Hugging Face id.")],
    draft: Annotated[
        str, typer.Option(help="An EAGLE-3 draft's directory; `init` or `init:CONFIG` for an untrained one.")
    ],
    run_dir: RunDir = DEFAULT_RUN_DIR,
    config: ConfigFiles = None,
    override: Overrides = None,
) -> None:
    """Serve MODEL with SGLang and keep training its draft. Every other flag goes to SGLang as it is."""
    settings = load_config(config or [], override or [])

    from onlinespec.serve import Supervisor, plan

    resolved = plan(model, draft, run_dir, settings, context.args)
    raise typer.Exit(Supervisor(resolved, say=_say).run())


@app.command()
def status(run_dir: RunDir = DEFAULT_RUN_DIR) -> None:
    """Show the draft in service, what the gate is held to, the tap's counters, the trainer and the race under way."""
    from onlinespec import operate

    for line in operate.status_lines(run_dir):
        typer.echo(line)


@app.command()
def doctor(
    what: Annotated[str, typer.Argument(help="A wheel, or where one was unpacked; or the version to look for.")] = "",
    sglang: Annotated[bool, typer.Option("--sglang", help="Which hook sites resolve in the installed SGLang.")] = False,
) -> None:
    """Look at what onlinespec attaches to. Exit code 1 where something does not fit."""
    from onlinespec.doctor import site_lines

    if not sglang:
        raise typer.BadParameter("nothing to look at; give --sglang")
    lines, is_fine = site_lines(what)
    for line in lines:
        typer.echo(line)
    raise typer.Exit(0 if is_fine else 1)


@app.command()
def history(
    run_dir: RunDir = DEFAULT_RUN_DIR,
    as_json: Annotated[bool, typer.Option("--json", help="The journal's events as JSON lines.")] = False,
) -> None:
    """Show every publish, verdict with its evidence, swap and order of a run directory, who did it and why."""
    from onlinespec.history import history_json, history_lines

    for line in history_json(run_dir) if as_json else history_lines(run_dir):
        typer.echo(line)


@app.command()
def promote(version: Version, reason: Reason = "", run_dir: RunDir = DEFAULT_RUN_DIR) -> None:
    """Put VERSION in service, whatever the gate says of it. Again: says so and changes nothing.

    Works with the sidecar dead. A stopped server starts with it the next time.
    """
    from onlinespec import operate

    typer.echo(operate.promote(run_dir, version, reason))


@app.command()
def offer(
    path: Annotated[Path, typer.Argument(help="Directory of a draft: model.safetensors and config.json.")],
    digest: Annotated[str, typer.Option(help="SHA-256 that model.safetensors should have; its own if left out.")] = "",
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Have the gate judge a draft that another tool trained: checks, race and trial as for the trainer's own.

    It is copied and waits until no other candidate is under way; `history` shows what became of it. With the sidecar
    dead it waits too. Again while it waits: says so and changes nothing.
    """
    from onlinespec import offers

    typer.echo(offers.offer(run_dir, path, digest))


@app.command()
def rollback(
    to: Annotated[int | None, typer.Option(help="Version to serve; the one before the incumbent if left out.")] = None,
    reason: Reason = "",
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Put an earlier draft back in service; the gate never promotes the one that is left again.

    Without --to each call goes back one further, and ends in an error where nothing was in service before. With
    --to N a second call says that N is in service and changes nothing. Works with the sidecar dead. A stopped
    server starts with it the next time.
    """
    from onlinespec import operate

    typer.echo(operate.roll_back(run_dir, to, reason))


@app.command()
def pin(version: Version, reason: Reason = "", run_dir: RunDir = DEFAULT_RUN_DIR) -> None:
    """Keep VERSION in service, putting it there first, until `unpin`: the gate judges on and promotes nothing.

    A pinned version is never deleted. Again: says so and changes nothing. Works with the sidecar dead.
    """
    from onlinespec import operate

    typer.echo(operate.pin(run_dir, version, reason))


@app.command()
def unpin(reason: Reason = "", run_dir: RunDir = DEFAULT_RUN_DIR) -> None:
    """Let other versions into service again. Without a pin: says so and changes nothing."""
    from onlinespec import operate

    typer.echo(operate.unpin(run_dir, reason))


@app.command()
def pause(reason: Reason = "", run_dir: RunDir = DEFAULT_RUN_DIR) -> None:
    """Have the gate start no race and promote nothing until `resume`, over restarts too; training goes on.

    Again: says so and changes nothing.
    """
    from onlinespec import operate

    typer.echo(operate.pause(run_dir, reason))


@app.command()
def resume(reason: Reason = "", run_dir: RunDir = DEFAULT_RUN_DIR) -> None:
    """Have a paused gate work again. Where it is not paused: says so and changes nothing."""
    from onlinespec import operate

    typer.echo(operate.resume(run_dir, reason))


@app.command()
def record(
    out: Annotated[Path | None, typer.Option(help="Directory: new, empty, or a recording to go on with.")] = None,
    max_gb: Annotated[float, typer.Option(help="Gigabytes (1e9 bytes) it may take in all.", min=1e-6, max=1e6)] = 1.0,
    stop: Annotated[bool, typer.Option("--stop", help="End the recording under way.")] = False,
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Keep what the running server's trainer learns from on disk, for `train`. Ctrl-C or --stop ends it.

    Only training traffic is written: conversations held out for the gate stay out, and so does what capture left out.
    """
    from rich.console import Console

    from onlinespec.record import command

    if stop == (out is not None):
        raise typer.BadParameter("give --out DIR to begin, or --stop to end")
    if out is None:
        typer.echo(command.stop(run_dir))
    else:
        command.record(run_dir, out, int(max_gb * 1e9), Console(stderr=True))


@app.command("record-dataset")
def record_dataset(
    file: Annotated[Path, typer.Argument(help="JSONL: OpenAI chat (messages) or ShareGPT (conversations).")],
    target: Annotated[str, typer.Option(help="The model: a directory, or a Hugging Face id.")],
    out: Annotated[Path, typer.Option(help="Directory of the recording: new, empty, or one to go on with.")],
    draft: Annotated[str, typer.Option(help="As for `train`: it says which hidden states a row holds.")] = "init",
    max_gb: Annotated[float, typer.Option(help="Gigabytes (1e9 bytes) it may take in all.", min=1e-6, max=1e6)] = 10.0,
    generate: Annotated[
        bool,
        typer.Option("--generate", help="Let the target answer, greedily, instead of the file."),
    ] = False,
    generate_tokens: Annotated[int, typer.Option(help="Longest such answer.", min=2)] = 512,
    temperature: Annotated[float, typer.Option(help="At which your server will sample; 0 is greedy.", min=0.0)] = 0.0,
    config: ConfigFiles = None,
    override: Overrides = None,
) -> None:
    """Make a recording from a data set with a transformers target, for those who have no server yet.

    The file's answers are text the target did not write: a draft trained on them learns what the target would say
    next at each place of it. With --generate the answers, and so the rows, are the target's own.
    """
    settings = load_config(config or [], override or [])

    from rich.console import Console

    from onlinespec.draft.start import read_start_config
    from onlinespec.offline.dataset import record_dataset as run
    from onlinespec.offline.rows import TargetRows
    from onlinespec.provision import resolve_model

    model = resolve_model(target)
    rows = TargetRows(
        model,
        read_start_config(draft, model),
        teacher_top_k=settings.capture.teacher_top_k,
        temperature=temperature,
        max_tokens=settings.buffer.max_sequence_tokens,
        generate_tokens=generate_tokens if generate else None,
        tenant=file.stem,
    )
    source = f"{file.name}, answers {'generated' if generate else 'of the file'}"
    sizes = {"shard_bytes": settings.record.shard_bytes, "max_bytes": int(max_gb * 1e9)}
    run(file, rows, out, source=source, console=Console(stderr=True), **sizes)


@app.command()
def train(
    recording: Annotated[Path, typer.Option(help="Directory that `record` or `record-dataset` wrote.")],
    target: Annotated[str, typer.Option(help="The model the recording was made with: directory or Hugging Face id.")],
    draft: Annotated[str, typer.Option(help="Directory of an EAGLE-3 draft; `init` or `init:CONFIG`: untrained.")],
    out: Annotated[Path, typer.Option(help="Where the draft, the report and the checkpoint go.")],
    epochs: Annotated[int, typer.Option(help="Passes over the recording.", min=1)] = 1,
    eval_frac: Annotated[float, typer.Option(help="Share of conversations kept to evaluate.", min=0.0, max=0.9)] = 0.1,
    eval_samples: Annotated[int, typer.Option(help="Requests walked at an evaluation.", min=1)] = 64,
    eval_steps: Annotated[int, typer.Option(help="Optimizer steps between evaluations.", min=1)] = 200,
    draft_steps: Annotated[int, typer.Option(help="Draft tokens per verify step of your server.", min=1, max=8)] = 3,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    report_to: Annotated[Literal["none", "tensorboard", "wandb"], typer.Option(help="Figures elsewhere.")] = "none",
    config: ConfigFiles = None,
    override: Overrides = None,
) -> None:
    """Train a draft from a recording, without a server, as the sidecar would; SGLang loads OUT/draft."""
    settings = load_config(config or [], override or [])

    from rich.console import Console

    from onlinespec.offline.screen import train as run
    from onlinespec.offline.train import TrainPlan
    from onlinespec.provision import resolve_model

    plan = TrainPlan(
        recording=recording,
        target=resolve_model(target),
        draft=draft,
        out=out,
        config=settings,
        epochs=epochs,
        eval_frac=eval_frac,
        eval_samples=eval_samples,
        eval_steps=eval_steps,
        num_draft_steps=draft_steps,
        is_resumed=resume,
        report_to=report_to,
        command=tuple(sys.argv),
    )
    raise typer.Exit(0 if run(plan, Console(stderr=True)) else 130)


@config_app.callback(invoke_without_command=True)
def config(context: typer.Context, files: ConfigFiles = None, override: Overrides = None) -> None:
    """Print every config value as it resolves; `explain` says where each came from."""
    if context.invoked_subcommand is None:
        show(files, override)
    elif files or override:
        raise typer.BadParameter(f"put --config and --set behind `{context.invoked_subcommand}`")


@config_app.command()
def show(files: ConfigFiles = None, override: Overrides = None) -> None:
    """Print every config value as it resolves, as YAML that --config reads."""
    typer.echo(dump_config(load_config(files or [], override or [])), nl=False)


@config_app.command("explain")
def explain_config(
    path: Annotated[str, typer.Argument(help="section.field or section; everything if left out.")] = "",
    files: ConfigFiles = None,
    override: Overrides = None,
) -> None:
    """Print each value with its default, where it came from, its bounds and what it means."""
    for line in explain(resolve(files or [], override or []), path):
        typer.echo(line)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def demo(
    context: typer.Context,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Where to work; a new one under runs/ if left out.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Answer tokens per phase.", min=1000)] = 50_000,
    target: Annotated[Path | None, typer.Option(help="Directory of another target that speaks this world.")] = None,
    override: Overrides = None,
) -> None:
    """Serve the demo world, shift its traffic half-way, and show what the draft learns.

    Other flags go to SGLang as they are.
    """
    from onlinespec.demo.run import run_demo

    raise typer.Exit(run_demo(run_dir, tokens, override or [], target, context.args))


def _say(line: str) -> None:
    typer.echo(line)
    sys.stdout.flush()


def main() -> None:
    """Entry point of the `onlinespec` script."""
    try:
        app()
    except OnlinespecError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
