"""The swap: other weights into the draft's own storage, between two scheduler iterations.

A version is staged first (read, checked, moved to the draft's device) off the scheduler's thread. The swap
itself is a copy into the same tensors on the stream that forwards run on, so it is ordered between two of
them, CUDA graphs stay valid and nothing is drained. Names are allow-listed by what the draft was started
with: `embed_tokens` is the target's own parameter, and a payload that carried it would change its answers.
"""

import contextlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from onlinespec.draft.header import MAP_NAMES, WEIGHTS_FILE, digest_of_bytes
from onlinespec.errors import SwapError


class StageVersion(msgspec.Struct, frozen=True):
    """To every rank: read this version now."""

    version: int
    path: str
    digest: str


class ApplyVersion(msgspec.Struct, frozen=True):
    """To every rank, at the same iteration: put it in service."""

    version: int


@dataclass(frozen=True)
class Staged:
    """Weights on the draft's device, checked."""

    version: int
    weights: dict[str, torch.Tensor]


def read_version(path: str, digest: str, names: frozenset[str]) -> dict[str, torch.Tensor]:
    """Weights of a version directory, on the CPU.

    Raises: SwapError where the file is missing, truncated, other than its digest, or carries other names
    than the draft in service.
    """
    file = Path(path) / WEIGHTS_FILE
    try:
        data = file.read_bytes()
    except OSError as error:
        raise SwapError(f"{file}: {error.strerror}; publish the version again") from error
    found = digest_of_bytes(data)
    if found != digest:
        raise SwapError(f"{file} has digest {found[:12]}, wanted {digest[:12]}; the file is damaged or was replaced")
    try:
        weights = load(data)
    except SafetensorError as error:
        raise SwapError(f"{file}: {error}; publish the version again") from error
    if extra := sorted(weights.keys() - names):
        raise SwapError(f"{file} has the tensor {extra[0]}, which the draft in service has not; nothing was swapped")
    if missing := sorted(names - weights.keys()):
        raise SwapError(f"{file} lacks the tensor {missing[0]}; nothing was swapped")
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise SwapError(f"{file}: {name} has values that are not finite; nothing was swapped")
    return weights


class Swapper:
    """Holds the draft of one rank. `stage` runs anywhere, `apply` on the scheduler's thread only.

    shapes: canonical name -> shape of the draft this server was started with.
    """

    def __init__(self, scheduler: Any, shapes: dict[str, tuple[int, ...]], version: int):
        self.version = version
        self.num_swaps = 0
        self.last_duration_s = 0.0
        self._scheduler = scheduler
        self._shapes = shapes
        self._staged: Staged | None = None
        self._staging: threading.Thread | None = None
        self._error: SwapError | None = None

    @property
    def model(self) -> Any:
        """SGLang 0.5.23 models/llama_eagle3.py LlamaForCausalLMEagle3."""
        return self._scheduler.draft_worker._draft_worker.draft_runner.model

    def stage(self, request: StageVersion) -> None:
        """Read and check a version and move it to the device. Raises: SwapError, see `read_version`."""
        names = frozenset(self._shapes)
        weights = read_version(request.path, request.digest, names)
        self._check_map(request.version, weights)
        for name, tensor in weights.items():
            if tuple(tensor.shape) != self._shapes[name]:
                raise SwapError(
                    f"version {request.version}: {name} has shape {tuple(tensor.shape)},"
                    f" the draft in service {self._shapes[name]}; nothing was swapped"
                )
        parameter = next(self.model.parameters())
        moved = {
            name: tensor.to(parameter.device, parameter.dtype)
            for name, tensor in weights.items()
            if name not in MAP_NAMES
        }
        if parameter.is_cuda:
            torch.cuda.current_stream(parameter.device).synchronize()
        self._staged = Staged(request.version, moved)

    def _check_map(self, version: int, weights: dict[str, torch.Tensor]) -> None:
        """The vocabulary map is frozen for a server's life: SGLang reads it once, at start."""
        if "d2t" not in weights:
            return
        offsets = weights["d2t"]
        served = self.model.hot_token_id.cpu() - torch.arange(len(offsets))
        if not torch.equal(offsets, served):
            raise SwapError(f"version {version} has another d2t than the draft in service; nothing was swapped")

    def begin_stage(self, request: StageVersion) -> None:
        """Stage in a thread; its error waits for `wait_staged`."""
        self._staged, self._error = None, None

        def read() -> None:
            try:
                self.stage(request)
            except SwapError as error:
                self._error = error

        self._staging = threading.Thread(target=read, name="onlinespec-stage", daemon=True)
        self._staging.start()

    def wait_staged(self) -> None:
        """Raises: SwapError where staging failed."""
        if self._staging is not None:
            self._staging.join()
        if self._error is not None:
            raise self._error

    def apply(self, request: ApplyVersion) -> None:
        """Copy the staged weights into the draft. Raises: SwapError where another version is staged."""
        self.wait_staged()
        staged = self._staged
        if staged is None or staged.version != request.version:
            raise SwapError(f"version {request.version} is not staged; nothing was swapped")
        began_s = time.perf_counter()
        is_cuda = next(self.model.parameters()).is_cuda
        with torch.cuda.stream(self._scheduler.forward_stream) if is_cuda else contextlib.nullcontext():
            before = self._shared_checksum()
            self.model.load_weights(list(staged.weights.items()))
            after = self._shared_checksum()
        self.version = request.version
        self.num_swaps += 1
        self._staged = None
        self.last_duration_s = time.perf_counter() - began_s
        if before != after:
            raise SwapError(f"version {request.version} changed the target's embedding table; restart the server now")

    def _shared_checksum(self) -> float:
        """Of the embedding table, which the draft shares with the target."""
        return float(self.model.model.embed_tokens.weight.detach().sum(dtype=torch.float64))
