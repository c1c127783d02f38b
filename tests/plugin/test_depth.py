"""Our policy in SGLang's adaptive controller: it holds what it is told, and only what was prepared."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from onlinespec.plugin.depth import Depth


def sglangs_controller():
    """The real one, from its file: importing its package would load SGLang whole."""
    root = Path(next(iter(importlib.util.find_spec("sglang").submodule_search_locations)))
    name = "onlinespec_test_adaptive_runtime_state"
    file = root / "srt/speculative/adaptive_runtime_state.py"
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.AdaptiveController


AdaptiveController = sglangs_controller()


class Worker:
    """What the controller asks of SGLang's worker; a state is its depth."""

    def __init__(self) -> None:
        self.speculative_num_steps = 3
        self.built: list[tuple[int, list[int] | None]] = []
        policy = SimpleNamespace(
            candidate_steps=[0, 3],
            set_cuda_graph_bs=lambda sizes: setattr(self, "sizes", sizes),
            cuda_graph_bs_for_step=lambda _step: self.sizes,
            get_steps_for_batch=lambda _batch_size: 0,
            on_verify_complete=lambda _correct, _batch_size: 0,
        )
        self.adaptive_controller = AdaptiveController(self, policy)

    def build_adaptive_runtime_state(self, speculative_num_steps, speculative_num_draft_tokens, cuda_graph_bs=None):
        assert speculative_num_draft_tokens == speculative_num_steps + 1
        self.built.append((speculative_num_steps, cuda_graph_bs))
        return speculative_num_steps

    def apply_runtime_state(self, state):
        self.speculative_num_steps = state


def test_the_depth_stays_whatever_sglangs_own_policy_would_say():
    worker = Worker()
    depth = Depth(worker, "")
    worker.adaptive_controller.init_states([1, 2])

    for _ in range(20):
        worker.adaptive_controller.activate_step_by_batch(2)
        worker.adaptive_controller.on_verify_complete([0, 0], batch_size=2)

    assert worker.built == [(0, [1, 2]), (3, [1, 2])]
    assert (worker.speculative_num_steps, depth.num_steps, depth.available) == (3, 3, [0, 3])


def test_a_depth_that_was_set_is_applied_at_the_next_decode_step_and_not_before():
    worker = Worker()
    depth = Depth(worker, "")
    worker.adaptive_controller.init_states(None)

    depth.set(0)

    assert (worker.speculative_num_steps, depth.num_steps) == (3, 0)
    worker.adaptive_controller.activate_step_by_batch(1)
    assert worker.speculative_num_steps == 0
    depth.set(3)
    worker.adaptive_controller.activate_step_by_batch(1)
    assert worker.speculative_num_steps == 3


def test_a_depth_for_some_steps_ends_by_itself_and_by_word():
    worker, ran = Worker(), []
    depth = Depth(worker, "")
    worker.adaptive_controller.init_states(None)

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            ran.append((depth.num_steps, depth.lasting))
            worker.adaptive_controller.activate_step_by_batch(1)
            assert worker.speculative_num_steps == ran[-1][0], "what is said before a step is what runs in it"

    depth.set(0, for_steps=2)
    run(3)
    depth.set(0, for_steps=5)
    run(1)
    is_at_rest = depth.lasts(3)
    depth.set(3)
    run(1)
    depth.set(0)
    depth.set(3, for_steps=1)
    run(2)

    assert ran == [(0, 3), (0, 3), (3, 3), (0, 3), (3, 3), (3, 0), (0, 0)]
    assert not is_at_rest
    assert depth.lasts(0)


def test_a_depth_that_was_not_prepared_is_refused_with_those_that_were():
    depth = Depth(Worker(), "")

    assert depth.refusal(2) == "depth 2 was not prepared at start; choose one of 0, 3"
    assert depth.refusal(0) == depth.refusal(3) == ""


def test_where_the_depth_is_not_ours_the_controller_keeps_its_policy_and_the_reason_is_said():
    worker = Worker()
    policy = worker.adaptive_controller.params

    depth = Depth(worker, "floor.enabled is false")

    assert worker.adaptive_controller.params is policy
    assert depth.refusal(0) == "the draft depth cannot be changed: floor.enabled is false"
    assert depth.available == [3]


def test_where_sglang_prepared_nothing_the_reason_points_to_its_log():
    worker = Worker()
    worker.adaptive_controller = None

    depth = Depth(worker, "")

    assert "SGLang did not prepare it" in depth.refusal(0)
    with pytest.raises(AssertionError):
        depth.set(0)
