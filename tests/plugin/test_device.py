"""The seam's two implementations keep the same promises; the GPU's are tested where there is one."""

import pytest
import torch

from onlinespec.plugin.device import CudaDevice, HostDevice, build_device

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU: streams and events")


def test_a_cpu_copies_at_once_and_nobody_waits():
    device, source = build_device(torch.device("cpu"), None), torch.arange(4.0)
    destination = device.pinned((4,), torch.float32)

    event = device.copy_aside([(destination, source)], after=device.mark())
    source.zero_()
    device.follow(event)
    event.wait()
    device.copy([source], [destination])

    assert isinstance(device, HostDevice)
    assert destination.tolist() == source.tolist() == [0, 1, 2, 3]
    assert event.is_done()
    assert device.free_bytes() is None


@needs_gpu
def test_a_gpus_copy_comes_after_the_work_before_it_and_before_what_follows_it():
    stream = torch.cuda.Stream()
    device = CudaDevice(torch.device("cuda"), stream)
    source, staged = torch.zeros(2**24, device="cuda"), torch.zeros(2**24, device="cuda")
    on_host = device.pinned((2**24,), torch.float32)
    torch.cuda.synchronize()

    with device.forwards():
        torch.cuda._sleep(10**8)
        source.fill_(3)
        to_host = device.copy_aside([(on_host, source)])
        is_early = to_host.is_done()
        loaded = device.copy_aside([(staged, on_host)], after=to_host)
        device.follow(loaded)
        source.copy_(staged).add_(1)
    to_host.wait()
    torch.cuda.synchronize()

    assert not is_early, "the copy would have been synchronous"
    assert on_host.is_pinned()
    assert (on_host.unique().tolist(), source.unique().tolist()) == ([3], [4])
    assert device.free_bytes() > 0


@needs_gpu
def test_a_gpus_copy_from_host_to_host_is_made_at_once_whatever_it_should_come_after():
    device = CudaDevice(torch.device("cuda"), None)
    source, destination = device.pinned((4,), torch.float32).fill_(3), device.pinned((4,), torch.float32).fill_(0)
    torch.cuda.synchronize()

    torch.cuda._sleep(10**8)
    busy = device.mark()
    device.copy_aside([(destination, source)], after=busy)
    copied, is_busy = destination.tolist(), not busy.is_done()
    torch.cuda.synchronize()

    assert (copied, is_busy) == ([3] * 4, True)


@needs_gpu
def test_memory_of_a_source_is_not_given_away_before_its_copy_aside_was_made():
    device = CudaDevice(torch.device("cuda"), None)
    on_host = device.pinned((2**24,), torch.float32)
    source = torch.full((2**24,), 3.0, device="cuda")
    torch.cuda.synchronize()

    with torch.cuda.stream(device._side):
        torch.cuda._sleep(10**8)
    copied = device.copy_aside([(on_host, source)])
    del source
    thieves = [torch.full((2**24,), 4.0, device="cuda") for _ in range(4)]
    copied.wait()

    assert on_host.unique().tolist() == [3]
    assert len(thieves) == 4


@needs_gpu
def test_forwards_come_behind_what_the_current_stream_has():
    device = CudaDevice(torch.device("cuda"), torch.cuda.Stream())
    source, seen = torch.zeros(2**20, device="cuda"), torch.zeros(2**20, device="cuda")
    torch.cuda.synchronize()

    torch.cuda._sleep(10**8)
    source.fill_(3)
    with device.forwards():
        device.copy([seen], [source])
    torch.cuda.synchronize()

    assert seen.unique().tolist() == [3]


@needs_gpu
def test_the_side_stream_is_none_of_those_that_torch_deals_to_others():
    others = [torch.cuda.Stream() for _ in range(64)]

    sides = [CudaDevice(torch.device("cuda"), others[0])._side for _ in range(40)]

    others += [torch.cuda.Stream(), torch.cuda.default_stream()]
    assert not {side.cuda_stream for side in sides} & {other.cuda_stream for other in others}
