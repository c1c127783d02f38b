"""Put the reference kernels where SGLang's CPU path looks for them.

SGLang finds kernels in two places: as names imported from a package `sgl_kernel`, and as `torch.ops.sgl_kernel.*`. Both
get our functions. A name that has no reference version raises an error that says so, at the import or at the call;
`hasattr` probes and guarded imports still read it as absent. Has to run before SGLang is imported.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable

import torch

from onlinespec.cpu.attention import decode_attention_cpu, extend_attention_cpu
from onlinespec.cpu.errors import (
    UnknownImportError,
    UnknownKernelError,
    UnsupportedOnCpuError,
    missing_kernel_message,
)
from onlinespec.cpu.kvcache import (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    build_draft_decode_metadata_cpu,
    copy_all_layer_kv_cache_cpu,
)
from onlinespec.cpu.speculative import (
    build_tree_kernel_efficient_cpu,
    fill_accept_out_cache_loc_cpu,
    fill_bonus_tokens_cpu,
    verify_tree_greedy_cpu,
)
from onlinespec.cpu.torchvision_ops import define_torchvision_ops

KERNELS: dict[str, Callable] = {
    kernel.__name__: kernel
    for kernel in (
        assign_draft_cache_locs_contiguous_cpu,
        assign_extend_cache_locs_cpu,
        assign_req_to_token_pool_cpu,
        build_draft_decode_metadata_cpu,
        build_tree_kernel_efficient_cpu,
        copy_all_layer_kv_cache_cpu,
        decode_attention_cpu,
        extend_attention_cpu,
        fill_accept_out_cache_loc_cpu,
        fill_bonus_tokens_cpu,
        verify_tree_greedy_cpu,
    )
}
# Imported at the top of modules that a plain text model loads, called only by features that are not supported.
IMPORTED_ONLY = ("rotate_input_ids_cpu",)


class ReferenceOps:
    """Stand for the `torch.ops.sgl_kernel` namespace."""

    def __init__(self) -> None:
        self.__dict__.update(KERNELS)

    def __getattr__(self, name: str) -> Callable:
        raise UnknownKernelError(missing_kernel_message(name))


class ReferenceModule(types.ModuleType):
    """Stand for the `sgl_kernel` package."""

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnknownImportError(missing_kernel_message(name))


def _refusal(name: str) -> Callable:
    def refuse(*args: object, **kwargs: object) -> None:
        raise UnsupportedOnCpuError(missing_kernel_message(name))

    refuse.__name__ = name
    return refuse


def is_installed() -> bool:
    """Say whether the reference kernels are in place in this process."""
    return isinstance(sys.modules.get("sgl_kernel"), ReferenceModule)


def _has_real_kernels() -> bool:
    """Say whether a real `sgl_kernel` with the CPU kernels imports here; one built for CUDA does not count."""
    if importlib.util.find_spec("sgl_kernel") is None:
        return False
    try:
        importlib.import_module("sgl_kernel")
    except (ImportError, OSError):
        return False
    return hasattr(torch.ops.sgl_kernel, "extend_attention_cpu")


def install() -> bool:
    """Install the kernels and the torchvision definitions; return whether the kernels are in place.

    Does nothing where a GPU is present or a real `sgl_kernel` has CPU kernels; may be called again.
    """
    if is_installed():
        return True
    if torch.cuda.is_available() or _has_real_kernels():
        return False
    define_torchvision_ops()
    module = ReferenceModule("sgl_kernel", "Reference kernels of onlinespec.cpu.")
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", loader=None)
    module.__dict__.update(KERNELS)
    module.__dict__.update({name: _refusal(name) for name in IMPORTED_ONLY})
    sys.modules["sgl_kernel"] = module
    setattr(torch.ops, "sgl_kernel", ReferenceOps())  # noqa: B010 (mypy knows no such attribute)
    return True
