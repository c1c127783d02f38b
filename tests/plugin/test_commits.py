"""Both ways to the commit tell a rider the same: which tokens became visible, and what the verify step counted."""

import ast
import importlib.util
import sys
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch

from onlinespec.plugin.auxiliary import AuxiliaryCarrier
from onlinespec.plugin.legacy import LegacyCarrier
from onlinespec.plugin.sites import known_versions, load_sites, sglang_root
from tests.plugin.late import garble
from tests.plugin.test_requests import Reason, Req


def load_auxiliary_output():
    """SGLang's own module, without the packages above it, which a CPU cannot import as they are."""
    file = sglang_root() / "srt/managers/auxiliary_output.py"
    spec = importlib.util.spec_from_file_location("sglangs_auxiliary_output", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SGLANGS = load_auxiliary_output()


class Copies:
    """SGLang's own copies to the host, taken from its source; the device's originals are overwritten right after."""

    def __init__(self) -> None:
        self.copied: list[torch.Tensor] = []
        """the originals"""
        module = ast.parse((sglang_root() / "srt/managers/utils.py").read_text())
        classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
        (result,) = (node for node in classes if node.name == "GenerationBatchResult")
        functions = [node for node in result.body if isinstance(node, ast.FunctionDef)]
        methods = [node for node in functions if node.name in ("copy_to_cpu", "copy_auxiliary_output_to_cpu")]
        self._methods: dict[str, Any] = {"torch": torch, "_async_d2h": self._to_host}
        exec(compile(ast.Module(methods, []), "managers/utils.py", "exec"), self._methods)

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        self.copied.append(tensor)
        on_host = tensor.clone()
        garble(tensor)
        return on_host

    def make(self, result: Any) -> None:
        """As SGLang does behind each pass."""
        for name in ("copy_to_cpu", "copy_auxiliary_output_to_cpu"):
            setattr(result, name, MethodType(self._methods[name], result))
        result.copy_to_cpu(return_logprob=False)


def call(function, *args, **_kwargs):
    return function(*args)


class Rider:
    def __init__(self) -> None:
        self.told: list[Any] = []

    def committed(self, reqs, commits, accept_lens_B) -> None:
        told = [(commit.output_index, commit.token_ids) if commit else None for commit in commits]
        self.told.append((list(reqs), told, accept_lens_B.tolist() if accept_lens_B is not None else None))


def result_of(accept_lens: list[int] | None) -> SimpleNamespace:
    """SGLang 0.5.23 managers/utils.py GenerationBatchResult, as far as it is copied."""
    lens = torch.tensor(accept_lens, dtype=torch.int32) if accept_lens is not None else None
    output = SimpleNamespace(auxiliary_device_output=None, hidden_states=None, sampling_mask_output=None)
    absent = ("block_accept_lens", "cap_lens", "routed_experts_output", "indexer_topk_output")
    return SimpleNamespace(
        **dict.fromkeys((*absent, "expert_distribution_metrics", "auxiliary_host_output")),
        accept_lens=lens,
        next_token_ids=torch.zeros(3, dtype=torch.int32),
        logits_output=output,
        copy_done=SimpleNamespace(record=lambda: None),
    )


def extend(reqs: list[Req], tokens: list[list[int]]) -> None:
    for req, new in zip(reqs, tokens, strict=True):
        req.output_ids += new


def through_auxiliary(rider: Rider, reqs: list[Req], tokens: list[list[int]], accept_lens) -> None:
    """As SGLang 0.5.23 managers/utils.py and batch_result_processor.py do it."""
    result = result_of(accept_lens)
    AuxiliaryCarrier(SGLANGS.append_auxiliary_output).attach(result, rider)
    Copies().make(result)
    starts = [len(req.output_ids) for req in reqs]
    extend(reqs, tokens)
    commits = [
        SGLANGS.CommittedTokens(start, tuple(req.output_ids[start:])) if len(req.output_ids) > start else None
        for req, start in zip(reqs, starts, strict=True)
    ]
    result.auxiliary_host_output.consume(SimpleNamespace(reqs=reqs), commits)


def through_legacy(rider: Rider, reqs: list[Req], tokens: list[list[int]], accept_lens) -> None:
    result, carrier = result_of(accept_lens), LegacyCarrier(call)
    carrier.attach(result, rider)
    Copies().make(result)  # 0.5.17's, as to accept_lens, does the same
    carrier.hooks["decode_result"](
        lambda _processor, _batch, _result: extend(reqs, tokens), object(), SimpleNamespace(reqs=reqs), result
    )


WAYS = pytest.mark.parametrize("carry", [through_auxiliary, through_legacy])


@WAYS
def test_a_rider_is_told_the_new_tokens_of_each_request_and_the_accept_lens(carry):
    rider, reqs = Rider(), [Req([1], output_ids=[5]), Req([2]), Req([3], output_ids=[6, 7])]

    carry(rider, reqs, [[8, 9], [], [10]], [2, 1, 1])

    assert rider.told == [(reqs, [(1, (8, 9)), None, (2, (10,))], [2, 1, 1])]


@WAYS
def test_a_prefill_has_no_accept_lens(carry):
    rider, reqs = Rider(), [Req([1])]

    carry(rider, reqs, [[8]], None)

    assert rider.told == [(reqs, [(0, (8,))], None)]


@pytest.mark.parametrize("carry", [AuxiliaryCarrier(SGLANGS.append_auxiliary_output), LegacyCarrier(call)])
def test_however_many_ride_a_result_nothing_is_copied_but_what_sglang_copies_for_itself(carry):
    result, copies = result_of([2, 1, 1]), Copies()
    originals = [result.next_token_ids, result.accept_lens]

    for _ in range(2):
        carry.attach(result, Rider())
    copies.make(result)

    assert [id(tensor) for tensor in copies.copied] == [id(tensor) for tensor in originals]


def test_once_it_was_copied_a_result_is_held_by_nothing_that_rides_it():
    result = result_of([1])
    AuxiliaryCarrier(SGLANGS.append_auxiliary_output).attach(result, Rider())

    Copies().make(result)

    assert result.logits_output.auxiliary_device_output is None
    assert vars(result.auxiliary_host_output).keys() == {"rider", "accept_lens_B"}


def test_tokens_behind_a_stop_inside_an_accepted_run_are_not_visible():
    rider, carrier, result, req = Rider(), LegacyCarrier(call), result_of([4]), Req([1], output_ids=[5])
    carrier.attach(result, rider)

    def process(*_args) -> str:
        req.output_ids += [6, 7, 8, 9]
        req.finished_reason, req.finished_len = Reason("stop"), 3
        return "returned"

    returned = carrier.around_process(process, object(), SimpleNamespace(reqs=[req]), result)

    assert returned == "returned"
    assert rider.told == [([req], [(1, (6, 7))], [4])]


def test_a_result_without_riders_is_processed_as_ever():
    seen = []

    LegacyCarrier(call).around_process(lambda *args: seen.append(args), "p", SimpleNamespace(reqs=[]), result_of(None))

    assert len(seen) == 1


def test_several_riders_of_one_result_are_all_told():
    riders, result, legacy = [Rider(), Rider()], result_of(None), LegacyCarrier(call)

    for rider in riders:
        AuxiliaryCarrier(SGLANGS.append_auxiliary_output).attach(result, rider)
        legacy.attach(result, rider)
    result.logits_output.auxiliary_device_output.copy_to_host(torch.clone).consume(SimpleNamespace(reqs=[]), [])
    legacy.around_process(lambda *_args: None, object(), SimpleNamespace(reqs=[]), result)

    assert [len(rider.told) for rider in riders] == [2, 2]


@pytest.mark.parametrize("version", known_versions())
def test_a_version_has_an_auxiliary_output_or_the_sites_of_the_way_around_it(version: str):
    names = {site.name for site in load_sites(version)}

    assert ("auxiliary" in names) != (set(LegacyCarrier(call).hooks) <= names)
