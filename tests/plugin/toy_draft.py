"""A draft in a server, as far as a swap goes: fused own weights, and a table that is the target's."""

from types import SimpleNamespace

import torch

from onlinespec.draft.header import digest
from onlinespec.plugin.swap import StageVersion, Swapper
from tests.plugin.late import LateDevice

WEIGHTS = {"fc.weight": torch.arange(6.0).reshape(2, 3), "norm.weight": torch.ones(3), "d2t": torch.arange(2)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}


class Model(torch.nn.Module):
    """A draft of SGLang's, as far as a swap goes: fused own weights, and a table that is the target's."""

    def __init__(self, table: torch.nn.Parameter) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(4, 2, _weight=table)
        self.model.embed_tokens.weight = table
        self.fused = torch.nn.Parameter(torch.full((3, 3), 7.0))
        self.unsaved = torch.nn.Parameter(torch.full((2,), 5.0))
        self.fused.weight_loader = self.load_shard
        self.hot_token_id = WEIGHTS["d2t"] + torch.arange(2)

    @staticmethod
    def load_shard(parameter: torch.nn.Parameter, loaded: torch.Tensor) -> None:
        """As SGLang's fused layers: fc in rows 0 and 1, norm in row 2."""
        parameter.data[2 if loaded.dim() == 1 else slice(0, 2)].copy_(loaded)

    def load_weights(self, pairs) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in pairs:
            if name == "embed_tokens.weight":
                parameters["model.embed_tokens.weight"].data.copy_(tensor)
            else:
                parameters["fused"].weight_loader(parameters["fused"], tensor)


FUSED = torch.cat([WEIGHTS["fc.weight"], WEIGHTS["norm.weight"][None]])


def build_swapper(device: LateDevice, reserve_bytes: int = 0) -> Swapper:
    target = torch.nn.Embedding.from_pretrained(torch.ones(4, 2))
    runner = SimpleNamespace(model=Model(target.weight))
    scheduler = SimpleNamespace(
        draft_worker=SimpleNamespace(_draft_worker=SimpleNamespace(draft_runner=runner)),
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(model=target)),
    )
    swapper = Swapper(scheduler, device, SHAPES, StageVersion(1, "first", "0" * 64), reserve_bytes)
    swapper.checks.wait()  # of the copy that every server makes at its start
    swapper.checks.poll()
    device.num_run = 0
    return swapper


def stage(swapper: Swapper, version: int, path: str) -> StageVersion:
    request = StageVersion(version, path, digest(path))
    swapper.begin_stage(request)
    swapper.wait_staged()
    return request


def drafting(swapper: Swapper) -> torch.Tensor:
    """The draft's weights, once the device has done all it was given."""
    swapper.device.synchronize()
    return swapper.model.fused
