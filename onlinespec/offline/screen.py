"""What a person sees while a training runs, and how Ctrl-C ends it."""

import signal
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from onlinespec.offline.train import Evaluation, Now, Training, TrainPlan


def train(plan: TrainPlan, console: Console) -> bool:
    """Run a training with a progress bar; False where Ctrl-C or SIGTERM ended it after a checkpoint.

    Raises: TrainError, RecordError, CheckpointError.
    """
    torch.set_num_threads(plan.config.trainer.num_threads)
    training = Training(plan)
    found = training.survey
    console.print(
        f"{found.num_training} samples with {found.num_training_tokens} answer tokens to train on, "
        f"{len(found.evaluation)} to evaluate; left out {found.num_repeats} as repeats, "
        f"{found.num_incomplete} for want of rows"
    )
    if plan.is_resumed:
        last = training.evaluations[-1].step if training.evaluations else 0
        told = f"resuming, last evaluated at step {last}" if training.has_resumed else "no checkpoint: from the start"
        console.print(told)
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: signals.append(number))
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        has_ended = training.run(_observer(bar), lambda: bool(signals))
    if has_ended:
        console.print(f"draft in {plan.out / 'draft'}, report in {plan.out / 'report.json'}")
    else:
        console.print(f"stopped; the checkpoint in {plan.out} is where --resume goes on")
    return has_ended


def _observer(bar: Progress) -> Callable[[Now], None]:
    """Moves the bar; prints each evaluation once."""
    task = bar.add_task("", total=None)
    started: list[tuple[float, int]] = []
    shown: list[Evaluation] = []

    def observe(now: Now) -> None:
        started[:] = started or [(time.monotonic(), now.num_tokens)]
        tokens_per_s = (now.num_tokens - started[0][1]) / max(time.monotonic() - started[0][0], 1e-9)
        evaluation = now.evaluation
        if evaluation is not None and evaluation not in shown:
            shown.append(evaluation)
            bar.console.print(f"step {evaluation.step}: accept length {_plain(evaluation.accept_length)}")
        accept = _plain(evaluation.accept_length) if evaluation else "-"
        text = f"loss {now.loss:.3f}, accept length {accept}, {tokens_per_s:.0f} tokens/s"
        bar.update(task, completed=now.place, total=now.num_places, description=text)

    return observe


def _plain(accept_length: float | None) -> str:
    return "-" if accept_length is None else f"{accept_length:.2f}"
