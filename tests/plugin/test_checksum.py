"""A write of ours to the target's table is an alarm, whichever version's first copy makes it."""

import pytest
import torch

from onlinespec.errors import SwapError
from onlinespec.plugin.swap import ApplyVersion, Swapper
from tests.plugin.late import LateDevice
from tests.plugin.toy_draft import FUSED, drafting, stage


def spoil(swapper: Swapper, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a copy into the draft writes to the target's table too."""
    install, table = swapper.weights.install, swapper.model.model.embed_tokens.weight.data
    monkeypatch.setattr(swapper.weights, "install", lambda slot: (install(slot), table.add_(1)))


@pytest.mark.parametrize("act", [lambda s: s.apply(ApplyVersion(7)), lambda s: s.put(7)])
def test_a_copy_that_reaches_the_targets_table_is_an_alarm_once_its_checksums_came(
    publish, swapper: Swapper, device: LateDevice, monkeypatch, act
):
    stage(swapper, 7, publish())
    spoil(swapper, monkeypatch)

    act(swapper)
    swapper.checks.poll()
    waits = device.num_waits

    with pytest.raises(SwapError, match="version 7 changed the target's embedding table; restart the server now"):
        swapper.checks.wait()
    assert device.num_waits == waits + 1
    for _ in range(2):
        with pytest.raises(SwapError, match="restart the server now"):
            swapper.checks.poll()


def test_checksums_that_came_and_agree_are_forgotten(publish, swapper: Swapper):
    stage(swapper, 7, publish())
    swapper.apply(ApplyVersion(7))

    swapper.checks.wait()
    swapper.checks.poll()

    assert not swapper.checks._open


def test_the_table_is_read_at_a_versions_first_copy_and_not_where_two_take_turns_or_one_is_promoted(
    publish, swapper: Swapper, monkeypatch
):
    sum_, sums = swapper.checks.sum, []
    monkeypatch.setattr(swapper.checks, "sum", lambda: (sums.append(swapper.version), sum_())[1])
    stage(swapper, 7, publish())

    for version in (7, 1, 7, 1, 7):
        swapper.put(version)
    swapper.apply(ApplyVersion(7))

    assert sums == [7, 7], "before and after; what the server began with was copied at its start"
    assert torch.equal(drafting(swapper), FUSED)


def test_a_version_that_takes_the_slot_of_one_that_was_checked_is_checked_too(publish, swapper: Swapper, monkeypatch):
    stage(swapper, 7, publish())
    for version in (7, 1):
        swapper.put(version)
    swapper.checks.wait()
    stage(swapper, 8, publish(norm__weight=torch.zeros(3)))
    spoil(swapper, monkeypatch)

    swapper.put(8)

    with pytest.raises(SwapError, match="version 8 changed the target's embedding table"):
        swapper.checks.wait()


def test_a_copy_that_broke_off_has_checked_nothing(publish, swapper: Swapper, monkeypatch):
    def fail(*_tensors) -> None:
        raise RuntimeError("device gone")

    stage(swapper, 7, publish())
    with monkeypatch.context() as broken:
        broken.setattr(swapper.device, "copy", fail)
        with pytest.raises(RuntimeError, match="device gone"):
            swapper.put(7)
    spoil(swapper, monkeypatch)

    swapper.put(7)

    with pytest.raises(SwapError, match="version 7 changed the target's embedding table"):
        swapper.checks.wait()
