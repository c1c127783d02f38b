"""The ring of pinned memory: slots never overlap, come back in order, and nobody waits for one."""

import random

import pytest
import torch

from onlinespec.plugin.ring import Ring

KIB = 1024


def build_ring(num_kib: int) -> Ring:
    return Ring(torch.zeros(num_kib * 1024, dtype=torch.uint8))


def test_a_slot_gives_views_of_each_shape_and_dtype_that_do_not_overlap():
    wanted = [torch.arange(6.0).view(2, 3), torch.arange(5, dtype=torch.int32), torch.ones(3, dtype=torch.bfloat16)]

    views = build_ring(4).take([tensor.nbytes for tensor in wanted]).like(wanted)
    for view, tensor in zip(views, wanted, strict=True):
        view.copy_(tensor)

    assert all(torch.equal(view, tensor) for view, tensor in zip(views, wanted, strict=True))
    assert [view.dtype for view in views] == [tensor.dtype for tensor in wanted]


def test_a_full_ring_has_no_slot_until_the_oldest_is_released():
    ring = build_ring(3)
    first, second, third = (ring.take([KIB]) for _ in range(3))
    assert None not in (first, second, third)

    assert ring.take([KIB]) is None
    second.release()
    assert ring.take([KIB]) is None, "room comes back in order"
    first.release()

    assert ring.take([KIB, KIB]) is not None


def test_a_slot_that_nobody_holds_any_more_is_free():
    ring = build_ring(1)
    slot = ring.take([KIB])

    del slot

    assert ring.take([KIB]) is not None


def test_what_is_larger_than_the_ring_never_fits():
    assert build_ring(1).take([KIB, KIB]) is None


@pytest.mark.parametrize("seed", range(3))
def test_slots_in_use_never_overlap_whatever_is_taken_and_released(seed: int):
    choose, ring, held = random.Random(seed), build_ring(16), []
    num_taken = 0
    for number in range(400):
        tensors = [torch.empty(choose.randrange(1, 3000), dtype=torch.uint8)]
        slot = ring.take([tensors[0].nbytes])
        if slot is not None:
            num_taken += 1
            view = slot.like(tensors)[0]
            view.fill_(number % 251)
            held.append((slot, view, number % 251))
        for _, other, value in held:
            assert bool((other == value).all())
        if held and (slot is None or choose.random() < 0.4):
            held.pop(choose.randrange(len(held)))[0].release()
    assert num_taken > 100
