"""What a device other than the CPU computes: everything, and without being asked for a value on the way.

torch's meta device holds no values: an operation that mixes it with the CPU fails, and so does reading a value.
"""

from dataclasses import fields, is_dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch._utils import _get_device_index  # what torch.cuda reads a device with

from onlinespec.draft.losses import Terms, head_loss
from onlinespec.draft.place import bound_memory, check_device, has_bfloat16, is_flex, is_half, placed
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


def test_what_was_captured_in_half_precision_is_moved_so_and_widened_where_it_is_computed():
    draft, embed_VD = build_draft(), build_embedding().bfloat16()
    sample = build_sample(1, 5, 9)
    half = replace(sample, aux_TA=sample.aux_TA.bfloat16())
    wide = replace(half, aux_TA=half.aux_TA.float())

    batch, expected = (
        build_batch([one], embed, 3, draft.draft_ids()) for one, embed in ((half, embed_VD), (wide, embed_VD.float()))
    )

    there = placed(batch, META).rows
    assert {x.dtype for x in (there.aux_CA, there.embed_CD, there.embed_NKD)} == {torch.bfloat16}
    assert torch.equal(draft.states(batch.rows), draft.states(expected.rows))


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True}, True),
        ({"architecture": "arm64", "bf16": True}, True),
        (None, False),
    ],
    ids=["x86 without", "x86", "arm", "a torch that cannot say"],
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_in_it(monkeypatch, capabilities, expected):
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)

    assert has_bfloat16(torch.device("cpu")) is expected
    assert {name: is_half(name, "cpu") for name in ("auto", "float32", "bfloat16")} == {
        "auto": expected,
        "float32": False,
        "bfloat16": True,
    }


@pytest.mark.parametrize(("compiler", "on_gpu"), [("cc-of-ours", True), (None, False)])
def test_attention_is_flex_on_a_gpu_that_it_can_be_compiled_for(monkeypatch, tmp_path, compiler, on_gpu):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr("shutil.which", lambda name: name if name == compiler else None)
    monkeypatch.setenv("CC", "cc-of-ours")

    found = {(name, device): is_flex(name, device) for name in ("auto", "math", "flex") for device in ("cpu", "cuda:1")}

    chosen = {("auto", "cuda:1"): on_gpu, ("flex", "cpu"): True, ("flex", "cuda:1"): True}
    assert found == dict.fromkeys(found, False) | chosen


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


@pytest.mark.parametrize(("device", "index"), [("cuda", 2), ("cuda:1", 1)])
def test_a_memory_bound_is_of_one_device_by_its_index_and_at_most_all_of_it(monkeypatch, device, index):
    bounds = []

    def set_fraction(fraction: float, device: object) -> None:
        bounds.append((_get_device_index(device), fraction))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=4 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_fraction)

    for gb in (0.0, 1.0, 8.0):
        bound_memory(device, gb)

    assert bounds == [(index, 0.25), (index, 1.0)]
