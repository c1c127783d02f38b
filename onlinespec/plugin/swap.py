"""The swap: other weights into the draft's own storage, between two scheduler iterations.

A version is staged first (read, checked, moved to the draft's device) off the scheduler's thread. The swap
itself is a copy into the same tensors on the stream that forwards run on, so it is ordered between two of
them, CUDA graphs stay valid and nothing is drained. Names are allow-listed by what the draft was started
with: `embed_tokens` is the target's own parameter, and a payload that carried it would change its answers.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from onlinespec.draft.checkpoint import unsound_reason
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
    """A version's weights on the draft's device, checked."""

    request: StageVersion
    weights: dict[str, torch.Tensor]


def read_version(
    path: str, digest: str, shapes: Mapping[str, tuple[int, ...]], maps: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Weights of a version directory, on the CPU. shapes, maps: of the draft in service, see `unsound_reason`.

    Raises: SwapError where the file is missing, truncated, other than its digest, or not sound.
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
    if reason := unsound_reason(weights, shapes, maps):
        raise SwapError(f"{file}: {reason}; nothing was swapped")
    return weights


class Swapper:
    """Holds the draft of one rank. `stage` runs anywhere, `put` and `apply` on the scheduler's thread only.

    shapes: canonical name -> shape of the draft this server was started with. in_service: that draft.
    agree: whether a statement holds on every rank; a collective on the scheduler's threads.
    """

    def __init__(
        self,
        scheduler: Any,
        shapes: dict[str, tuple[int, ...]],
        in_service: StageVersion,
        agree: Callable[[bool], bool] = bool,
    ):
        self.version = in_service.version
        """the one that drafts now; another than the incumbent only in a switchback"""
        self.in_service = in_service
        """the version last swapped in, or started with"""
        self.num_swaps = 0
        self.last_duration_s = 0.0
        self._scheduler = scheduler
        self._shapes = shapes
        self._agree = agree
        self._staged: dict[int, Staged] = {}
        self._staging: threading.Thread | None = None
        self._error: SwapError | None = None

    @property
    def incumbent(self) -> int:
        return self.in_service.version

    @property
    def model(self) -> Any:
        """SGLang 0.5.23 models/llama_eagle3.py LlamaForCausalLMEagle3."""
        return self._scheduler.draft_worker._draft_worker.draft_runner.model

    def stage(self, request: StageVersion) -> Staged:
        """Read and check a version and move it to the device. Raises: SwapError, see `read_version`."""
        weights = read_version(request.path, request.digest, self._shapes, self._maps())
        parameter = next(self.model.parameters())
        moved = {
            name: tensor.to(parameter.device, parameter.dtype)
            for name, tensor in weights.items()
            if name not in MAP_NAMES
        }
        if parameter.is_cuda:
            torch.cuda.current_stream(parameter.device).synchronize()
        return Staged(request, moved)

    def _maps(self) -> dict[str, torch.Tensor]:
        """The vocabulary map as SGLang read it at start; of `t2d` it keeps nothing."""
        if "d2t" not in self._shapes:
            return {}
        ids_W = self.model.hot_token_id.cpu()
        return {"d2t": ids_W - torch.arange(len(ids_W))}

    def begin_stage(self, *requests: StageVersion) -> None:
        """Stage in a thread, in place of what was staged before; its error waits for `wait_staged`."""
        staged: dict[int, Staged] = {}
        self._staged, self._error = staged, None

        def read() -> None:
            try:
                for request in requests:
                    staged[request.version] = self.stage(request)
            except SwapError as error:
                self._error = error

        self._staging = threading.Thread(target=read, name="onlinespec-stage", daemon=True)
        self._staging.start()

    def wait_staged(self) -> None:
        """Raises: SwapError where staging failed on this rank."""
        if self._staging is not None:
            self._staging.join()
        if self._error is not None:
            raise self._error

    def check_staged(self, version: int) -> None:
        """On every rank at the same iteration. Raises: SwapError, on all of them, where one has it not staged."""
        refusal: SwapError | None = None
        try:
            self.wait_staged()
            if version not in self._staged:
                refusal = SwapError(f"version {version} is not staged; nothing was swapped")
        except SwapError as error:
            refusal = error
        if not self._agree(refusal is None):
            self._staged = {}
            raise refusal or SwapError(
                f"another rank could not stage version {version}, its log says why; nothing was swapped"
            )

    def apply(self, request: ApplyVersion) -> None:
        """Make the staged version the incumbent. Raises: SwapError where a rank has it not staged."""
        self.check_staged(request.version)
        began_s = time.perf_counter()
        staged = self._staged[request.version]
        is_target_unchanged = self._copy(staged)
        self.version, self.in_service = request.version, staged.request
        self.num_swaps += 1
        self._staged = {}
        self.last_duration_s = time.perf_counter() - began_s
        if not is_target_unchanged:
            raise _target_changed(request.version)

    def put(self, version: int) -> None:
        """Let a staged version draft; it stays staged, and the incumbent the incumbent."""
        self.version = version  # first: a copy that breaks off must not pass for what it overwrote
        if not self._copy(self._staged[version]):
            raise _target_changed(version)

    def drop_residents(self) -> None:
        """Free what is staged."""
        self._staged = {}

    def _copy(self, staged: Staged) -> bool:
        """Into the draft's storage, ordered between two forwards. False where the target's table is another then."""
        is_cuda = next(self.model.parameters()).is_cuda
        with torch.cuda.stream(self._scheduler.forward_stream) if is_cuda else contextlib.nullcontext():
            before = self._shared_checksum()
            self.model.load_weights(list(staged.weights.items()))
            return before == self._shared_checksum()

    def _shared_checksum(self) -> float:
        """Of the embedding table, which the draft shares with the target."""
        return float(self.model.model.embed_tokens.weight.detach().sum(dtype=torch.float64))


def _target_changed(version: int) -> SwapError:
    return SwapError(f"version {version} changed the target's embedding table; restart the server now")
