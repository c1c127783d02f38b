"""Depth: how many tokens the draft proposes per verify step, changed while the server runs.

SGLang can prebuild one state (buffers, attention backends, CUDA graphs) per depth, for a controller of its own
that goes by accept lengths alone. We keep the states and put our policy in its place: it holds what it is told.
SGLang asks the policy at the start of every decode step, on every rank, so a depth that changed by an order
takes effect at the same step everywhere. At depth 0 the target verifies one token per request, which is a plain
decode step; the draft still reads the committed tokens, so its KV stays warm for the way back.
"""

from typing import Any, Protocol


class Policy(Protocol):
    """Source: SGLang 0.5.23 speculative/adaptive_runtime_state.py AdaptiveSpecPolicy."""

    @property
    def candidate_steps(self) -> list[int]: ...

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None: ...

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None: ...


class HeldDepth:
    """Stands where SGLang's policy stood; which states are built stays that one's to say."""

    def __init__(self, policy: Policy, num_steps: int):
        self.num_steps = num_steps
        self._policy = policy

    @property
    def candidate_steps(self) -> list[int]:
        return self._policy.candidate_steps

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        self._policy.set_cuda_graph_bs(cuda_graph_bs)

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        return self._policy.cuda_graph_bs_for_step(step)

    def get_steps_for_batch(self, batch_size: int) -> int:
        return self.num_steps

    def on_verify_complete(self, num_correct_drafts_per_req: list[int], batch_size: int) -> None:
        """SGLang's would answer with another depth."""


class Depth:
    """The depth of one rank. worker: SGLang 0.5.23 speculative/eagle_worker_v2.py EAGLEWorkerV2.

    refused: why the depth is not ours to change; empty where it is.
    """

    def __init__(self, worker: Any, refused: str):
        self._worker = worker
        self._held: HeldDepth | None = None
        self.refused = refused
        if refused:
            return
        if worker.adaptive_controller is None:
            self.refused = "SGLang did not prepare it; its log says 'speculative_adaptive disabled' and why"
            return
        self._held = HeldDepth(worker.adaptive_controller.params, int(worker.speculative_num_steps))
        worker.adaptive_controller.params = self._held

    @property
    def num_steps(self) -> int:
        """Of the next decode step."""
        return self._held.num_steps if self._held is not None else int(self._worker.speculative_num_steps)

    @property
    def available(self) -> list[int]:
        """Depths that `set` takes; the one there is where it is not ours to change."""
        return sorted(self._held.candidate_steps) if self._held is not None else [self.num_steps]

    def refusal(self, num_steps: int) -> str:
        """Why this depth cannot be; empty where it can."""
        if self._held is None:
            return f"the draft depth cannot be changed: {self.refused}"
        if num_steps not in self.available:
            return f"depth {num_steps} was not prepared at start; choose one of {', '.join(map(str, self.available))}"
        return ""

    def set(self, num_steps: int) -> None:
        """On the scheduler's thread, from the next decode step on."""
        assert self._held is not None
        assert num_steps in self.available, num_steps
        self._held.num_steps = num_steps
