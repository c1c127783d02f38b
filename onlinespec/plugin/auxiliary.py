"""Riding SGLang's own auxiliary output to the commit (SGLang 0.5.20 and later).

SGLang copies on a side stream into pinned memory, and its scheduler waits for that copy before it commits tokens.
So nothing of ours goes that way: what the commit needs of the pass, SGLang copies for itself. The rows go a way of
their own (`rows`): 24 KB each for a target of width 4096, they would delay every token by their copy, and in prefill
by megabytes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from onlinespec.plugin.commits import Commit, Rider


@dataclass(frozen=True)
class OnDevice:
    """Source: SGLang 0.5.23 managers/auxiliary_output.py DeviceAuxiliaryOutput."""

    rider: Rider
    result: Any

    def copy_to_host(self, _copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> "OnHost":
        """Copies nothing: by now the result has SGLang's own host copy of `accept_lens` in the place of the device's.

        Source: SGLang 0.5.23 managers/utils.py GenerationBatchResult.copy_to_cpu.
        """
        return OnHost(self.rider, self.result.accept_lens)


@dataclass(frozen=True)
class OnHost:
    """Source: SGLang 0.5.23 managers/auxiliary_output.py HostAuxiliaryOutput."""

    rider: Rider
    accept_lens_B: torch.Tensor | None
    """there when SGLang's copy of the result is"""

    def consume(self, batch: Any, commits: Sequence[Commit | None]) -> None:
        """Called by SGLang once the pass's tokens are committed, before they are streamed."""
        self.rider.committed(batch.reqs, commits, self.accept_lens_B)


class AuxiliaryCarrier:
    """See the module's docstring. append: SGLang 0.5.23 managers/auxiliary_output.py append_auxiliary_output."""

    hooks: ClassVar[Mapping[str, Callable[..., Any]]] = {}

    def __init__(self, append: Callable[[Any, Any], Any]):
        self._append = append

    def attach(self, result: Any, rider: Rider) -> None:
        output = result.logits_output
        output.auxiliary_device_output = self._append(output.auxiliary_device_output, OnDevice(rider, result))
