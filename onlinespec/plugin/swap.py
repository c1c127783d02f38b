"""The swap: other weights into the draft's own storage, between two scheduler iterations.

A version is staged first (read, checked, brought to the draft's device) off the scheduler's thread. The swap
itself is a copy into the same tensors on the stream that forwards run on, so it is ordered between two
of them, CUDA graphs stay valid and nothing is drained. It waits on the device for the staging, never on the
scheduler's thread. Names are allow-listed by what the draft was started with: `embed_tokens` is the target's own
parameter, and a payload that carried it would change its answers.
"""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from onlinespec.draft.checkpoint import unsound_reason
from onlinespec.draft.header import MAP_NAMES, WEIGHTS_FILE, digest_of_bytes
from onlinespec.errors import NotYetError, SwapError
from onlinespec.plugin.checksum import TableChecks
from onlinespec.plugin.device import Device
from onlinespec.plugin.weights import Slot, Weights


class StageVersion(msgspec.Struct, frozen=True):
    """To every rank: read this version now."""

    version: int
    path: str
    digest: str


class ExpectStaged(msgspec.Struct, frozen=True):
    """To every rank: say whether this version is staged. None waits."""

    version: int


class ApplyVersion(msgspec.Struct, frozen=True):
    """To every rank, at the same iteration: put it in service."""

    version: int


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
    """Holds the draft of one rank. Staging runs anywhere, `put` and `apply` on the scheduler's thread only.

    shapes: canonical name -> shape of the draft this server was started with. in_service: that draft.
    reserve_bytes: see `Weights`. agree: whether a statement holds on every rank; a collective on the scheduler's
    threads.
    """

    def __init__(
        self,
        scheduler: Any,
        device: Device,
        shapes: dict[str, tuple[int, ...]],
        in_service: StageVersion,
        reserve_bytes: int,
        agree: Callable[[bool], bool] = bool,
    ):
        self.version = in_service.version
        """the one that drafts now; another than the incumbent only in a switchback"""
        self.in_service = in_service
        """the version last swapped in, or started with"""
        self.num_swaps = 0
        self.last_duration_s = 0.0
        """seconds of the scheduler's thread; on a GPU the copy itself goes on behind it"""
        self._scheduler = scheduler
        self.device = device
        self._shapes = shapes
        self._agree = agree
        self.weights = Weights(self.model, scheduler.tp_worker.model_runner.model, device, reserve_bytes)
        self.checks = TableChecks(self.model.model.embed_tokens.weight, device)
        self._incumbent: Slot = self.weights.slots[0]
        self._incumbent.holds = in_service
        self._staged: Slot | None = None
        self._staging: threading.Thread | None = None
        self._error: SwapError | None = None
        self._install(self._incumbent)  # the same bytes: kernels are loaded and memory is pinned before any request

    @property
    def incumbent(self) -> int:
        return self.in_service.version

    @property
    def model(self) -> Any:
        """SGLang 0.5.23 models/llama_eagle3.py LlamaForCausalLMEagle3."""
        return self._scheduler.draft_worker._draft_worker.draft_runner.model

    def _maps(self) -> dict[str, torch.Tensor]:
        """The vocabulary map as SGLang read it at start; of `t2d` it keeps nothing."""
        if "d2t" not in self._shapes:
            return {}
        ids_W = self.model.hot_token_id.cpu()
        return {"d2t": ids_W - torch.arange(len(ids_W))}

    def begin_stage(self, request: StageVersion) -> None:
        """Stage in a thread, in place of what was staged before; its error waits for who asks.

        What a slot holds already, the predecessor most of all, is staged at once and read from nowhere.
        """
        before = self._staging
        self._staging = threading.Thread(
            target=self._stage, args=(request, before), name="onlinespec-stage", daemon=True
        )
        self._staging.start()

    def _stage(self, request: StageVersion, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()  # of a version that another rank refused: it may still be writing
        self._error = None
        self._staged = next((slot for slot in self.weights.slots if _is_same(slot.holds, request)), None)
        if self._staged is not None:
            return
        slot = next(slot for slot in self.weights.slots if slot is not self._incumbent)
        try:
            weights = read_version(request.path, request.digest, self._shapes, self._maps())
        except SwapError as error:
            self._error = error
            return
        for name in MAP_NAMES:
            weights.pop(name, None)
        self.weights.fill(slot, weights, request)
        self._staged = slot

    def wait_staged(self) -> None:
        """Until it has succeeded or failed on this rank; never on the scheduler's thread."""
        if self._staging is not None:
            self._staging.join()

    def expect_staged(self, version: int) -> None:
        """On every rank at the same iteration. Raises, on all of them: NotYetError while one is still staging,
        SwapError where one has it not staged."""
        if not self._agree(not self._is_staging):
            raise NotYetError(f"version {version} is still being staged")
        self._check_staged(version)

    @property
    def _is_staging(self) -> bool:
        return self._staging is not None and self._staging.is_alive()

    def _check_staged(self, version: int) -> None:
        """See `expect_staged`."""
        refusal = self._error
        if self._is_staging or self._staged is None or self._staged.holds.version != version:
            refusal = refusal or SwapError(f"version {version} is not staged; nothing was swapped")
        if not self._agree(refusal is None):
            self._staged = None
            raise refusal or SwapError(
                f"another rank could not stage version {version}, its log says why; nothing was swapped"
            )

    def apply(self, request: ApplyVersion) -> None:
        """Make the staged version the incumbent. Raises: SwapError where a rank has it not staged."""
        self._check_staged(request.version)
        assert self._staged is not None
        began_s = time.perf_counter()
        staged = self._staged
        self._install(staged)
        self.version, self.in_service = request.version, staged.holds
        self.num_swaps += 1
        self._incumbent, self._staged = staged, None
        self.last_duration_s = time.perf_counter() - began_s

    def put(self, version: int) -> None:
        """Let the staged version or the incumbent draft; the incumbent stays the incumbent. Raises: SwapError."""
        self.version = version  # first: a copy that breaks off must not pass for what it overwrote
        slot = self._incumbent if version == self.incumbent else self._staged
        if slot is None:
            raise SwapError(f"version {version} is not resident; the draft stays what it is")
        self._install(slot)

    def drop_residents(self) -> None:
        """Nothing is staged any more."""
        self._staged = None

    def _install(self, slot: Slot) -> None:
        """Into the draft's storage, ordered between two forwards.

        `checks` tells whether the target's table was hit, once for what a slot holds: a later copy out of it, as a
        switchback makes many, writes the same bytes to the same addresses. A check reads the whole table twice, for
        Llama 3.1 8B 2.1 GB beside the 1.7 GB that the copy reads and writes.
        """
        with self.device.forwards():
            if slot.is_checked:
                self.weights.install(slot)
                return
            before = self.checks.sum()
            self.weights.install(slot)
            self.checks.expect_same(slot.holds.version, before)
            slot.is_checked = True


def _is_same(held: StageVersion | None, request: StageVersion) -> bool:
    """The path does not matter: bytes are what their digest says."""
    return held is not None and (held.version, held.digest) == (request.version, request.digest)
