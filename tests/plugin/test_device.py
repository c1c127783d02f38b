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

    assert isinstance(device, HostDevice)
    assert destination.tolist() == [0, 1, 2, 3]
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
        loaded = device.copy_aside([(staged, on_host)], after=to_host)
        device.follow(loaded)
        source.copy_(staged).add_(1)
    is_early = to_host.is_done()
    to_host.wait()
    torch.cuda.synchronize()

    assert not is_early, "the copy would have been synchronous"
    assert on_host.is_pinned()
    assert (on_host.unique().tolist(), source.unique().tolist()) == ([3], [4])
    assert device.free_bytes() > 0
