"""Which SGLang flags and environment variables a CPU without AMX needs. Imports neither torch nor SGLang.

A flag the user gave is never repeated, so these are defaults and the user's word stands.
"""

import ctypes
import os
from collections.abc import Sequence
from itertools import pairwise

# --attention-backend intel_amx falls back to torch_native, which has no EAGLE; the two halves, named apart, do not.
ATTENTION_FLAGS = {"--prefill-attention-backend": "intel_amx", "--decode-attention-backend": "intel_amx"}
CUDA_GRAPH_FLAGS = {"--cuda-graph-backend-decode": "disabled", "--cuda-graph-backend-prefill": "disabled"}
OTHER_FLAGS = {
    "--device": "cpu",
    "--dtype": "float32",  # bfloat16 is slow without bfloat16 instructions
    "--mem-fraction-static": "0.2",
    "--max-total-tokens": "32768",
    "--max-running-requests": "16",
    "--sleep-on-idle": None,  # the scheduler spins on a core otherwise
}
TP_FLAGS = ("--tp-size", "--tp", "--tensor-parallel-size")


def is_needed() -> bool:
    """Say whether this machine has no GPU that SGLang could use: no CUDA device (as CUDA_VISIBLE_DEVICES leaves them),
    no ROCm driver."""
    return _num_cuda_devices() == 0 and not os.path.exists("/dev/kfd")


def _num_cuda_devices() -> int:
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return 0
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _given(user_flags: Sequence[str]) -> dict[str, str | None]:
    """Map the user's flags to their values; None for a flag that stands alone."""
    given: dict[str, str | None] = {}
    for flag, following in pairwise([*user_flags, "--"]):
        if flag.startswith("--"):
            name, has_value, value = flag.partition("=")
            given[name] = value if has_value else (None if following.startswith("--") else following)
    return given


def flags(user_flags: Sequence[str]) -> list[str]:
    """Return the SGLang flags to add to those the user gave."""
    given = _given(user_flags)
    wanted: dict[str, str | None] = dict(OTHER_FLAGS)
    if "--attention-backend" not in given:
        wanted |= ATTENTION_FLAGS
    if "--disable-cuda-graph" not in given and "--cuda-graph-config" not in given:
        wanted |= CUDA_GRAPH_FLAGS
    added: list[str] = []
    for name, value in wanted.items():
        if name not in given:
            added += [name] if value is None else [name, value]
    return added


def environment(user_flags: Sequence[str] = ()) -> dict[str, str]:
    """Return the environment variables the server process needs; with TP one group of cores per rank."""
    variables = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    given = _given(user_flags)
    if "--enable-torch-compile" not in given:
        # SGLang compiles a few small functions whatever the flags: 1.5 s inside the first speculative request, and
        # torch's CPU compiler wants a C++ compiler on the serving machine.
        variables["TORCH_COMPILE_DISABLE"] = "1"
    num_ranks = max((int(given[name] or 1) for name in TP_FLAGS if name in given), default=1)
    if num_ranks > 1:
        cores = sorted(os.sched_getaffinity(0))
        per_rank = max(1, len(cores) // num_ranks)
        groups = [[cores[(rank * per_rank + i) % len(cores)] for i in range(per_rank)] for rank in range(num_ranks)]
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, group)) for group in groups)
    return variables
