"""What a device other than the CPU computes: everything, and without being asked for a value on the way.

torch's meta device holds no values: an operation that mixes it with the CPU fails, and so does reading a value.
"""

from dataclasses import fields, is_dataclass

import pytest
import torch

from onlinespec.draft.losses import Terms, head_loss
from onlinespec.draft.place import check_device, placed
from onlinespec.errors import ConfigError
from onlinespec.trainer.batch import build_batch
from tests.draft.tiny import build_draft, build_embedding, build_sample

META = torch.device("meta")


@pytest.fixture
def batch():
    draft = build_draft()
    return build_batch([build_sample(1, 5, 9), build_sample(2, 3, 12)], build_embedding(), 3, draft.draft_ids())


def devices(value) -> set[str]:
    parts = [getattr(value, field.name) for field in fields(value)]
    found = {part.device.type for part in parts if isinstance(part, torch.Tensor)}
    return found.union(*(devices(part) for part in parts if is_dataclass(part)))


def test_a_batch_is_placed_whole_and_on_the_cpu_not_copied(batch):
    assert devices(placed(batch, META)) == {"meta"}
    assert placed(batch, torch.device("cpu")) is batch


@pytest.mark.parametrize("is_recomputing", [False, True])
def test_forward_and_backward_stay_on_the_device_and_read_nothing_back(batch, is_recomputing):
    draft = build_draft().to(META)
    draft.is_recomputing = is_recomputing
    there = placed(batch, META)

    states_MD = draft.states(there.rows).flatten(0, 1)[there.kept_M]
    weight_M = torch.ones(len(there.kept_M), device=META)
    loss, is_match_M = head_loss(
        states_MD, draft.lm_head.weight, there.targets, weight_M, Terms(0.5, 0.2, 0.3), there.chains
    )
    loss.backward()

    assert {loss.device.type, is_match_M.device.type} == {"meta"}
    assert {p.grad.device.type for p in draft.parameters()} == {"meta"}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # it is compiled on CUDA alone
def test_flex_attention_says_what_the_math_says(batch):
    draft = build_draft()
    with torch.no_grad():
        expected = draft.states(batch.rows)
        draft.is_flex = True
        found = draft.states(batch.rows)

    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_device_that_torch_does_not_see_is_an_error_that_says_how_many_it_sees(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cpu")
    check_device("cuda")
    check_device("cuda:1")

    with pytest.raises(ConfigError, match=r"trainer\.device is cuda:2 .* sees 2 CUDA devices; set trainer\.device"):
        check_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="sees 0 CUDA devices"):
        check_device("cuda")
