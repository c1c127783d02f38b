"""Muon's orthogonalisation and the learning rates of the two groups."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from onlinespec.config import TrainerConfig
from onlinespec.trainer.optim import DraftOptimizer, orthogonalize


@pytest.mark.parametrize("is_half", [False, True])
@pytest.mark.parametrize("shape", [(3, 24, 16), (2, 16, 40), (1, 8, 8)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_the_directions(shape, is_half):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100

    result = orthogonalize(matrices, is_half)

    before, after = torch.linalg.svd(matrices, full_matrices=False), torch.linalg.svdvals(result)
    large = 0.02 * before.S.norm(dim=-1, keepdim=True) < before.S
    assert float(after[large].min()) > 0.5
    assert float(after.max()) < 1.3
    polar = before.U @ before.Vh
    cosine = (result * polar).sum((1, 2)) / result.norm(dim=(1, 2)) / polar.norm(dim=(1, 2))
    assert float(cosine.min()) > 0.95
    assert (result.shape, result.dtype) == (matrices.shape, matrices.dtype)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("is_half", "expected"), [(False, torch.float32), (True, torch.bfloat16)])
def test_muon_multiplies_in_the_dtype_of_the_trainer(device, is_half, expected):
    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
                dtypes.update(x.dtype for x in args if isinstance(x, torch.Tensor))
            return operation(*args, **(kwargs or {}))

    dtypes: set[torch.dtype] = set()
    with FakeTensorMode(), Products():
        shapes = {"a.weight": (6, 4), "norm.weight": (4,)}
        parameters = {name: torch.nn.Parameter(torch.zeros(s, device=device)) for name, s in shapes.items()}
        optimizer = DraftOptimizer(parameters, TrainerConfig(), is_half)
        parameters["a.weight"].grad = torch.ones(6, 4, device=device)
        optimizer.step()

    assert dtypes == {expected}


def build_parameters() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (6, 4), "b.weight": (6, 4), "c.weight": (3, 5), "norm.weight": (4,), "lm_head.weight": (7, 4)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def set_gradients(parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_matrices_follow_muon_one_by_one_and_the_rest_follow_adamw():
    config = TrainerConfig(warmup_steps=2, muon_lr=0.1, adamw_lr=0.01)
    parameters = build_parameters()
    optimizer = DraftOptimizer(parameters, config)
    expected = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    rest = [torch.nn.Parameter(expected[name].clone()) for name in ("norm.weight", "lm_head.weight")]
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)
    momentum = {name: torch.zeros_like(expected[name]) for name in ("a.weight", "b.weight", "c.weight")}

    for seed, warmup in enumerate((0.5, 1.0, 1.0)):
        set_gradients(parameters, seed)
        for name, buffer in momentum.items():
            gradient = parameters[name].grad
            buffer.mul_(0.95).add_(0.05 * gradient)
            update = orthogonalize((0.05 * gradient + 0.95 * buffer)[None])[0]
            rows, columns = update.shape
            expected[name] -= 0.1 * warmup * max(1, rows / columns) ** 0.5 * update
        for parameter, name in zip(rest, ("norm.weight", "lm_head.weight"), strict=True):
            parameter.grad = parameters[name].grad.clone()
        adamw.param_groups[0]["lr"] = 0.01 * warmup
        adamw.step()
        optimizer.step()

    expected |= {"norm.weight": rest[0], "lm_head.weight": rest[1]}
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, expected[name], check_device=False, msg=lambda m, n=name: f"{n}: {m}")


def test_clip_scales_all_gradients_together_and_tells_the_norm_before():
    parameters = build_parameters()
    set_gradients(parameters, 0)
    before = torch.cat([parameter.grad.flatten() for parameter in parameters.values()])
    optimizer = DraftOptimizer(parameters, TrainerConfig(clip_norm=0.5))

    norm = optimizer.clip()

    after = torch.cat([parameter.grad.flatten() for parameter in parameters.values()])
    assert norm == pytest.approx(float(before.norm()))
    torch.testing.assert_close(after, before * 0.5 / before.norm(), atol=1e-5, rtol=1e-4)
