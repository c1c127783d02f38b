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
    """Stands where SGLang's policy stood; which states are built stays that one's to say.

    num_steps: the depth that lasts; another may be held for some decode steps, which SGLang's questions count.
    """

    def __init__(self, policy: Policy, num_steps: int):
        self.num_steps = num_steps
        self._policy = policy
        self._passing = 0
        self._num_left = 0

    def hold(self, num_steps: int, for_steps: int) -> None:
        """for_steps: 0 for a depth that lasts."""
        self._num_left = for_steps
        if for_steps:
            self._passing = num_steps
        else:
            self.num_steps = num_steps

    @property
    def is_passing(self) -> bool:
        """Another depth is held for steps that are not all run."""
        return self._num_left > 0

    @property
    def next_steps(self) -> int:
        """The depth of the next decode step."""
        return self._passing if self.is_passing else self.num_steps

    @property
    def candidate_steps(self) -> list[int]:
        return self._policy.candidate_steps

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        self._policy.set_cuda_graph_bs(cuda_graph_bs)

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        return self._policy.cuda_graph_bs_for_step(step)

    def get_steps_for_batch(self, batch_size: int) -> int:
        """Asked once at the start of a decode step."""
        num_steps = self.next_steps
        self._num_left = max(0, self._num_left - 1)
        return num_steps

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
        return self._held.next_steps if self._held is not None else self.lasting

    @property
    def lasting(self) -> int:
        """The depth that holds until told, one held for some steps apart."""
        return self._held.num_steps if self._held is not None else int(self._worker.speculative_num_steps)

    def lasts(self, num_steps: int) -> bool:
        """Nothing is to be done for this depth to hold until told."""
        return self.lasting == num_steps and not (self._held is not None and self._held.is_passing)

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

    def set(self, num_steps: int, for_steps: int = 0) -> None:
        """On the scheduler's thread, from the next decode step on; for so many of them, 0: until told."""
        assert self._held is not None
        assert num_steps in self.available, num_steps
        self._held.hold(num_steps, for_steps)
