"""How what we noted of a forward pass reaches its commit: one interface over two generations of SGLang.

The result of a pass is processed later (under overlap scheduling while the next pass runs), and only then it is
known which tokens became visible. `auxiliary` rides SGLang's own auxiliary output; `legacy` wraps the two methods
that process results, where there is none.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch


class Commit(Protocol):
    """Tokens of one request that a pass made visible. Source: SGLang 0.5.23 managers/auxiliary_output.py
    CommittedTokens."""

    @property
    def output_index(self) -> int: ...

    @property
    def token_ids(self) -> tuple[int, ...]: ...


class Rider(Protocol):
    """What waits for a commit. It runs inside the fuse, which it brings itself."""

    def committed(
        self, reqs: Sequence[Any], commits: Sequence[Commit | None], accept_lens_B: torch.Tensor | None
    ) -> None:
        """On the scheduler's thread. commits: aligned with reqs, None without tokens. accept_lens_B: int [B] on the
        host, as the verify step counted; None after a prefill."""


class Carrier(Protocol):
    """Carries riders of one server."""

    @property
    def hooks(self) -> Mapping[str, Callable[..., Any]]:
        """Name of a site -> our hook there; what this way needs beyond the sites that both have."""

    def attach(self, result: Any, rider: Rider) -> None:
        """Right after the pass, on its stream. result: SGLang 0.5.23 managers/utils.py GenerationBatchResult."""
