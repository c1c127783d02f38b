"""Errors of the CPU path: what SGLang asked for and the reference kernels do not do."""


class UnsupportedOnCpuError(NotImplementedError):
    """An SGLang feature that the reference CPU kernels refuse instead of computing a wrong result."""


class UnknownKernelError(UnsupportedOnCpuError, AttributeError):
    """A `torch.ops.sgl_kernel` entry that has no reference version.

    It is an AttributeError so that SGLang's own `hasattr(torch.ops.sgl_kernel, ...)` probes read "absent".
    """


class UnknownImportError(UnsupportedOnCpuError, ImportError):
    """A name imported from `sgl_kernel` that has no reference version.

    It is an ImportError so that SGLang's guarded imports fall back as they do without the wheel.
    """


def missing_kernel_message(kernel: str) -> str:
    """Say which kernel is missing and what to do about it."""
    return (
        f"SGLang asked for the kernel sgl_kernel.{kernel}, which the reference CPU kernels of onlinespec do not have: "
        "the SGLang feature that uses it (quantised weights, MoE, MLA, Mamba, vision or another draft algorithm) "
        "is not supported on a CPU without AMX. Drop the flag or choose a dense text model with full attention, "
        "or serve on a GPU."
    )


def unsupported_argument_message(kernel: str, argument: str, found: object) -> str:
    """Say which argument of which kernel was refused and what to do about it."""
    return (
        f"sgl_kernel.{kernel} was called with {argument} = {found!r}, which the reference CPU kernels of onlinespec "
        "do not support; choose a dense text model with full attention in float32, or serve on a GPU."
    )
