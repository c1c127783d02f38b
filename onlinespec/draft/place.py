"""Where tensors lie, and in what is multiplied there.

A frozen dataclass of tensors is built on the CPU and moved to the device that computes with it.
"""

import dataclasses
import os
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from onlinespec.errors import ConfigError

_T = TypeVar("_T")
_CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""x86 and Arm. Source: torch 2.13 torch.cpu.get_capabilities"""


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


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions that multiply bfloat16; an older torch cannot say it of a CPU."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # torch asks the current one
            return torch.cuda.is_bf16_supported(including_emulation=False)
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name, False) for name in _CPU_BFLOAT16)


def is_half(dtype: str, device: str) -> bool:
    """Whether `trainer.dtype` means bfloat16 on `trainer.device`."""
    return dtype == "bfloat16" or (dtype == "auto" and has_bfloat16(torch.device(device)))


def is_flex(attention: str, device: str) -> bool:
    """Whether `trainer.attention` means FlexAttention on `trainer.device`: auto, where it can be compiled."""
    return attention == "flex" or (attention == "auto" and device != "cpu" and can_compile())


def can_compile() -> bool:
    """Whether triton finds what it builds the launcher of a kernel with: a C compiler and Python's header.

    Source: triton 3.6 runtime/build.py _build.
    """
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return header.exists() and any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "gcc", "clang"))


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
