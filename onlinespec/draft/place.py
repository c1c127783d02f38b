"""Where tensors lie: a frozen dataclass of tensors, built on the CPU, on the device that computes with it."""

import dataclasses
from typing import Any, TypeVar

import torch

from onlinespec.errors import ConfigError

_T = TypeVar("_T")


def placed(value: _T, device: torch.device) -> _T:
    """The same with every tensor on the device, in dataclasses inside it too. The copies are ordered on its stream."""
    if device.type == "cpu":
        return value
    assert dataclasses.is_dataclass(value)
    moved: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        if isinstance(part, torch.Tensor):
            moved[field.name] = part.to(device)
        elif dataclasses.is_dataclass(part):
            moved[field.name] = placed(part, device)
    return dataclasses.replace(value, **moved)  # type: ignore[type-var]


def check_device(device: str) -> None:
    """Raises: ConfigError where torch does not see the device."""
    if device == "cpu":
        return
    num_devices = torch.cuda.device_count()
    if torch.device(device).index is None and num_devices:
        return
    if (torch.device(device).index or 0) >= num_devices:
        raise ConfigError(
            f"trainer.device is {device} and torch {torch.__version__} sees {num_devices} CUDA devices;"
            " set trainer.device to one of them or to cpu"
        )


def bound_memory(device: str, max_gb: float) -> None:
    """Let torch's allocator of this process fail beyond so many 2**30 bytes of the device; 0 bounds nothing."""
    if max_gb:
        index = torch.device(device).index
        index = torch.cuda.current_device() if index is None else index  # the allocator wants one
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max_gb * 2**30 / total), index)
