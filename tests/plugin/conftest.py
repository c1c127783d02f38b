from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from onlinespec.plugin.swap import Swapper
from tests.plugin.late import LateDevice
from tests.plugin.toy_draft import WEIGHTS, build_swapper


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., str]:
    """Write a version directory with some tensors changed (None removes one); returns its path."""

    def write(**changes: torch.Tensor | None) -> str:
        tensors = WEIGHTS | {name.replace("__", "."): tensor for name, tensor in changes.items()}
        save_file({name: t for name, t in tensors.items() if t is not None}, tmp_path / "model.safetensors")
        return str(tmp_path)

    return write


@pytest.fixture
def device() -> LateDevice:
    return LateDevice()


@pytest.fixture
def swapper(device: LateDevice) -> Swapper:
    return build_swapper(device)
