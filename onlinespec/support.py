"""Which SGLang settings onlinespec refuses, and which it serves without capturing, by name.

Read from the command line before SGLang is imported; the README's table is this file in words.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from onlinespec.errors import UnsupportedError

ALIASES = {
    "--model": "--model-path",
    "--tp": "--tp-size",
    "--tensor-parallel-size": "--tp-size",
    "--dp": "--dp-size",
    "--data-parallel-size": "--dp-size",
    "--pp": "--pp-size",
    "--pipeline-parallel-size": "--pp-size",
    "--speculative-algo": "--speculative-algorithm",
    "--speculative-draft-model": "--speculative-draft-model-path",
}

REFUSED_FLAGS = {
    "--enable-dp-attention": "DP attention",
    "--speculative-draft-model-quantization": "a quantised draft",
    "--speculative-draft-load-format": "another load format of the draft",
}
UNCAPTURED_FLAGS = {
    "--speculative-use-rejection-sampling": "rejection sampling breaks the accept walk",
    "--speculative-adaptive": "the draft depth changes under way",
    "--speculative-draft-window-size": "a draft that forgets all but the last tokens is not what is trained",
}
# Source: SGLang 0.5.23 speculative/adaptive_spec_params.py adaptive_unsupported_reason, arg_groups/lora_hook.py,
# arg_groups/hisparse_hook.py.
FIXED_DEPTH_FLAGS = {
    "--enable-lora": "SGLang does not switch LoRA's CUDA graphs with it",
    "--lora-paths": "SGLang does not switch LoRA's CUDA graphs with it",
    "--enable-hisparse": "HiSparse has buffers of one size",
    "--enable-multi-layer-eagle": "SGLang's worker for it has one depth",
    "--enable-two-batch-overlap": "SGLang would lose its wrapper around the attention backend",
    "--enable-pdmux": "SGLang does not switch its decode backends with it",
}
OUR_ARGUMENTS = {
    "--model-path": "give the model as the first argument",
    "--speculative-draft-model-path": "give the draft as --draft PATH, or --draft init",
}
_READ_FLAGS = (
    *REFUSED_FLAGS,
    *UNCAPTURED_FLAGS,
    *FIXED_DEPTH_FLAGS,
    *OUR_ARGUMENTS,
    "--host",
    "--port",
    "--context-length",
    "--quantization",
    "--tp-size",
    "--dp-size",
    "--pp-size",
    "--disaggregation-mode",
    "--speculative-algorithm",
    "--speculative-num-steps",
    "--speculative-eagle-topk",
    "--speculative-accept-threshold-single",
    "--speculative-accept-threshold-acc",
)


@dataclass(frozen=True)
class ServerFlags:
    """The user's SGLang flags, as given and as a dict; None is the value of a flag that stands alone."""

    given: tuple[str, ...]
    values: dict[str, str | None]

    def get(self, name: str, default: str) -> str:
        value = self.values.get(name, default)
        return default if value is None else value

    def integer(self, name: str, default: int) -> int:
        """Raises: UnsupportedError where the value is no whole number."""
        text = self.get(name, str(default))
        try:
            return int(text)
        except ValueError as error:
            raise UnsupportedError(f"{name} {text}: wanted a whole number") from error

    def number(self, name: str, default: float) -> float:
        """Raises: UnsupportedError where the value is no number."""
        text = self.get(name, str(default))
        try:
            return float(text)
        except ValueError as error:
            raise UnsupportedError(f"{name} {text}: wanted a number") from error


def parse_flags(flags: Sequence[str]) -> ServerFlags:
    """Read SGLang flags of the forms `--name value`, `--name=value` and `--name`."""
    values: dict[str, str | None] = {}
    for flag, following in zip(flags, [*flags, "--"][1:], strict=True):
        if flag.startswith("--"):
            name, separator, value = flag.partition("=")
            name = ALIASES.get(name, name)
            values[name] = value if separator else (None if following.startswith("--") else following)
    return ServerFlags(tuple(flags), values)


def refuse_unsupported(flags: ServerFlags) -> None:
    """Raises: UnsupportedError naming the first setting that is not supported, and what to do."""
    for name in flags.values:  # argparse would take an abbreviation, and we would miss it
        whole = [full for full in _READ_FLAGS if full.startswith(name) and full != name and name not in _READ_FLAGS]
        if whole:
            raise UnsupportedError(f"{name}: flags may not be abbreviated; write {' or '.join(whole)}")
    for name, what in REFUSED_FLAGS.items():
        if name in flags.values:
            raise UnsupportedError(f"{name}: {what} is not supported; leave the flag out")
    for name, advice in OUR_ARGUMENTS.items():
        if name in flags.values:
            raise UnsupportedError(f"{name} is onlinespec's to set; {advice}")
    algorithm = flags.get("--speculative-algorithm", "EAGLE3")
    if algorithm.upper() != "EAGLE3":
        raise UnsupportedError(f"--speculative-algorithm {algorithm}: onlinespec trains EAGLE3 drafts; leave it out")
    for name, what in (("--dp-size", "data parallelism inside one server"), ("--pp-size", "pipeline parallelism")):
        if flags.integer(name, 1) > 1:
            raise UnsupportedError(f"{name} {flags.values[name]}: {what} is not supported; use 1")
    mode = flags.get("--disaggregation-mode", "null")
    if mode != "null":
        raise UnsupportedError(f"--disaggregation-mode {mode}: PD disaggregation is not supported; leave it out")
    for name in ("--speculative-accept-threshold-single", "--speculative-accept-threshold-acc"):
        if flags.number(name, 1.0) < 1.0:
            raise UnsupportedError(f"{name} {flags.values[name]} is lossy: the target's answers would change; use 1.0")


def capture_refusal(flags: ServerFlags) -> str:
    """Why the server is served without capture; empty where it is captured."""
    topk = flags.integer("--speculative-eagle-topk", 1)
    if topk > 1:
        return f"--speculative-eagle-topk {topk}: the accept walk is defined for chains (topk 1), not for trees"
    for name, why in UNCAPTURED_FLAGS.items():
        if name in flags.values:
            return f"{name}: {why}"
    if "--quantization" in flags.values:
        return (
            f"--quantization {flags.values['--quantization']} quantises the draft too, which cannot be swapped in place"
        )
    return ""


def depth_refusal(flags: ServerFlags) -> str:
    """Why the draft depth of a server that is captured cannot be changed under way; empty where it can."""
    for name, why in FIXED_DEPTH_FLAGS.items():
        if name in flags.values:
            return f"{name}: {why}"
    return ""
