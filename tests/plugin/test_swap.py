"""What may become the draft's weights: exactly the file that was judged, exactly the names in service."""

import threading
from pathlib import Path

import pytest
import torch

from onlinespec.draft.header import digest
from onlinespec.errors import NotYetError, SwapError
from onlinespec.plugin import swap
from onlinespec.plugin.swap import ApplyVersion, StageVersion, Swapper, read_version
from tests.plugin.late import LateDevice
from tests.plugin.toy_draft import FUSED, SHAPES, WEIGHTS, build_swapper, drafting, stage


def test_a_sound_version_is_read_as_it_was_written(publish):
    path = publish()

    weights = read_version(path, digest(path), SHAPES, {})

    assert weights.keys() == SHAPES.keys()
    assert all(torch.equal(weights[name], WEIGHTS[name]) for name in SHAPES)


def test_a_missing_file_is_refused_by_its_path(tmp_path: Path):
    with pytest.raises(SwapError, match=r"model\.safetensors: No such file or directory; publish the version again"):
        read_version(str(tmp_path), "0" * 64, SHAPES, {})


def test_other_bytes_than_those_judged_are_refused_with_both_digests(publish):
    judged = digest(publish())
    path = publish(norm__weight=torch.zeros(3))

    with pytest.raises(SwapError, match=f"has digest {digest(path)[:12]}, wanted {judged[:12]}; the file is damaged"):
        read_version(path, judged, SHAPES, {})


@pytest.mark.parametrize("num_bytes", [0, 4, 30, -1])
def test_a_truncated_file_is_refused_even_where_its_digest_is_the_one_asked_for(publish, num_bytes: int):
    path = publish()
    file = Path(path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])

    with pytest.raises(SwapError, match=r"model\.safetensors: .*; publish the version again"):
        read_version(path, digest(path), SHAPES, {})


@pytest.mark.parametrize("name", ["embed_tokens.weight", "model.embed_tokens.weight", "midlayer.bias"])
def test_a_tensor_that_the_draft_in_service_has_not_is_refused_by_name(publish, name: str):
    path = publish(**{name: torch.ones(2)})

    with pytest.raises(SwapError, match=rf"has the tensor {name}, .*nothing was swapped"):
        read_version(path, digest(path), SHAPES, {})


def test_a_tensor_that_is_missing_is_refused_by_name(publish):
    path = publish(norm__weight=None)

    with pytest.raises(SwapError, match=r"lacks the tensor norm\.weight; nothing was swapped"):
        read_version(path, digest(path), SHAPES, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_by_the_name_of_its_tensor(publish, value: float):
    path = publish(norm__weight=torch.tensor([1.0, value, 1.0]))

    with pytest.raises(SwapError, match=r"norm\.weight has values that are not finite; nothing was swapped"):
        read_version(path, digest(path), SHAPES, {})


def test_a_swap_makes_the_staged_version_the_incumbent_and_nothing_is_staged_then(publish, swapper: Swapper):
    stage(swapper, 7, publish())

    swapper.apply(ApplyVersion(7))

    assert torch.equal(drafting(swapper), FUSED)
    assert (swapper.version, swapper.incumbent, swapper.num_swaps) == (7, 7, 1)
    with pytest.raises(SwapError, match="version 7 is not staged; nothing was swapped"):
        swapper.apply(ApplyVersion(7))


def test_a_swap_waits_on_the_device_for_the_staging_and_not_on_the_schedulers_thread(
    publish, swapper: Swapper, device: LateDevice
):
    stage(swapper, 7, publish())
    run_before, waits_before = device.num_run, device.num_waits

    swapper.apply(ApplyVersion(7))

    assert (run_before, device.num_waits) == (0, waits_before), "staged, but the copy had not run"
    assert torch.equal(drafting(swapper), FUSED)


def test_the_copy_is_launched_where_forwards_run_and_into_the_storage_that_graphs_know(
    publish, swapper: Swapper, device: LateDevice, monkeypatch
):
    stage(swapper, 7, publish())
    address, install, places = swapper.model.fused.data_ptr(), swapper.weights.install, []
    monkeypatch.setattr(swapper.weights, "install", lambda slot: (places.append(device.is_forward), install(slot)))

    swapper.apply(ApplyVersion(7))

    assert places == [True]
    assert swapper.model.fused.data_ptr() == address


def test_a_tensor_that_no_version_carries_stays_what_it_was(publish, swapper: Swapper):
    stage(swapper, 7, publish())

    swapper.apply(ApplyVersion(7))

    drafting(swapper)
    assert swapper.model.unsaved.tolist() == [5, 5]


def test_going_back_to_the_predecessor_reads_nothing(publish, swapper: Swapper):
    first = StageVersion(1, "this path does not exist", "0" * 64)
    stage(swapper, 7, publish())
    swapper.apply(ApplyVersion(7))

    swapper.begin_stage(first)
    swapper.wait_staged()
    swapper.apply(ApplyVersion(1))

    assert torch.equal(drafting(swapper), torch.full((3, 3), 7.0))
    assert (swapper.version, swapper.incumbent) == (1, 1)


@pytest.mark.parametrize("free_bytes", [10_000, 0])
def test_a_candidate_takes_the_predecessors_slot_only_behind_the_last_copy_out_of_it(publish, free_bytes: int):
    device = LateDevice(free_bytes)
    swapper = build_swapper(device, reserve_bytes=900)
    stage(swapper, 7, publish())
    swapper.put(7)
    read_by_a_forward = torch.zeros(3, 3)
    with device.forwards():
        device.copy([read_by_a_forward], [swapper.model.fused])
    swapper.put(1)

    stage(swapper, 8, publish(norm__weight=torch.zeros(3)))
    swapper.put(8)

    assert drafting(swapper)[2].tolist() == [0, 0, 0]
    assert torch.equal(read_by_a_forward, FUSED)


def test_host_memory_is_loaded_again_only_when_what_it_held_has_left(publish, swapper: Swapper, device: LateDevice):
    stage(swapper, 7, publish())
    num_run = device.num_run

    stage(swapper, 8, publish(norm__weight=torch.zeros(3)))

    assert (num_run, device.num_run) == (0, 1)


def test_a_file_that_is_refused_leaves_the_predecessor_resident(publish, swapper: Swapper):
    stage(swapper, 7, publish())
    swapper.apply(ApplyVersion(7))
    path = publish(norm__weight=None)

    stage(swapper, 8, path)
    with pytest.raises(SwapError, match="lacks the tensor"):
        swapper.expect_staged(8)

    assert {slot.holds.version for slot in swapper.weights.slots} == {1, 7}


@pytest.mark.parametrize(("num_drafts_free", "is_on_device"), [(2, True), (1, False), (0, False)])
def test_versions_are_resident_on_the_device_where_the_reserve_allows_for_both_and_in_pinned_memory_else(
    publish, num_drafts_free: int, is_on_device: bool
):
    num_bytes = sum(tensor.nbytes for tensor in build_swapper(LateDevice()).weights.own)
    device = LateDevice(900 + num_drafts_free * num_bytes)
    swapper = build_swapper(device, reserve_bytes=900)

    stage(swapper, 7, publish())
    swapper.apply(ApplyVersion(7))

    assert swapper.weights.are_on_device == is_on_device
    assert device.num_pinned_bytes == num_bytes * (1 if is_on_device else 3) + 2 * 16, "and two checksums, twice"
    assert torch.equal(drafting(swapper), FUSED)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fc__weight": torch.ones(3, 2)}, r"fc\.weight has shape \(3, 2\), the draft in service \(2, 3\)"),
        ({"d2t": WEIGHTS["d2t"] + 1}, "it has another d2t than the draft in service"),
    ],
)
def test_another_shape_or_vocabulary_map_is_refused_before_anything_is_staged(publish, swapper: Swapper, changes, said):
    path = publish(**changes)
    stage(swapper, 7, path)

    with pytest.raises(SwapError, match=f"{said}; nothing was swapped"):
        swapper.apply(ApplyVersion(7))

    assert bool((drafting(swapper) == 7).all())


def test_a_version_on_trial_drafts_while_the_incumbent_stays_the_incumbent(publish, swapper: Swapper):
    stage(swapper, 7, publish())
    swapper.expect_staged(7)

    swapper.put(7)
    drafted, state = drafting(swapper).clone(), (swapper.version, swapper.incumbent, swapper.num_swaps)
    swapper.put(1)

    assert torch.equal(drafted, FUSED)
    assert state == (7, 1, 0)
    assert bool((drafting(swapper) == 7).all())


def test_a_version_that_is_not_resident_is_not_put(swapper: Swapper):
    with pytest.raises(SwapError, match="version 9 is not resident"):
        swapper.put(9)

    assert bool((drafting(swapper) == 7).all())


def test_a_rank_that_could_not_stage_keeps_all_of_them_from_swapping(publish, swapper: Swapper):
    heard: list[bool] = []
    swapper._agree = lambda is_ready: heard.append(is_ready)  # None: another rank is not ready
    stage(swapper, 7, publish())

    with pytest.raises(SwapError, match="another rank could not stage version 7"):
        swapper.apply(ApplyVersion(7))

    assert heard == [True]
    assert swapper.version == 1
    assert bool((drafting(swapper) == 7).all())


def test_a_rank_whose_staging_failed_says_so_to_the_others_before_it_raises_its_own_error(publish, swapper: Swapper):
    heard: list[bool] = []
    swapper._agree = lambda is_so: heard.append(is_so) or is_so
    stage(swapper, 7, publish(norm__weight=None))

    with pytest.raises(SwapError, match=r"lacks the tensor norm\.weight"):
        swapper.expect_staged(7)

    assert heard == [True, False], "done with it, and not well"


def test_no_schedulers_thread_waits_for_a_rank_that_still_stages(publish, swapper: Swapper, monkeypatch):
    heard, may_go_on, read = [], threading.Event(), swap.read_version
    monkeypatch.setattr(swap, "read_version", lambda *of: (may_go_on.wait(), read(*of))[1])
    swapper._agree = lambda is_so: heard.append(is_so) or is_so
    path = publish()
    swapper.begin_stage(StageVersion(7, path, digest(path)))

    with pytest.raises(NotYetError, match="version 7 is still being staged"):
        swapper.expect_staged(7)
    with pytest.raises(SwapError, match="version 7 is not staged; nothing was swapped"):
        swapper.apply(ApplyVersion(7))
    may_go_on.set()
    swapper.wait_staged()
    swapper.expect_staged(7)

    assert heard == [False, False, True, True]


def test_a_payload_that_names_the_targets_table_finds_no_way_to_it(swapper: Swapper):
    slot = swapper.weights.slots[1]

    swapper.weights.fill(slot, {"norm.weight": torch.zeros(3)}, StageVersion(7, "p", "d"))
    with pytest.raises(KeyError):
        swapper.weights.fill(slot, {"embed_tokens.weight": torch.zeros(4, 2)}, StageVersion(7, "p", "d"))

    assert slot.holds is None, "half written"
    assert bool((swapper.model.model.embed_tokens.weight == 1).all())
