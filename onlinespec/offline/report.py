"""Where the figures of a training go beside its own files: TensorBoard or Weights & Biases, where asked for.

Both are optional and imported only then.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from onlinespec.errors import TrainError

Target = Literal["none", "tensorboard", "wandb"]


class Reporter(Protocol):
    """Takes figures by optimizer step."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Silent:
    """`--report-to none`."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard:
    """Event files below OUT/tensorboard."""

    def __init__(self, out: Path):
        self._writer = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(out / "tensorboard"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of the project `onlinespec`, or of WANDB_PROJECT, below OUT; WANDB_MODE=offline keeps it there."""

    def __init__(self, out: Path, settings: Mapping[str, Any]):
        self._run = _module("wandb", "wandb").init(dir=str(out), name=out.name, config=dict(settings))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def build_reporter(target: Target, out: Path, settings: Mapping[str, Any]) -> Reporter:
    """Raises: TrainError where the package is not installed."""
    match target:
        case "none":
            return Silent()
        case "tensorboard":
            return TensorBoard(out)
        case "wandb":
            return Wandb(out, settings)


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TrainError(f"--report-to {package}: {error}; pip install {package}") from error
