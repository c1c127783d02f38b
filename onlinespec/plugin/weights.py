"""The draft's weights as the server lays them out: two resident versions, and the copy between them and the draft.

A version's file has canonical names; SGLang's `load_weights` fuses and shards them (qkv, gate_up, vocabulary). It is
run once a version, on stand-ins of the draft's own parameters in host memory, so what it knows stays its to know.
From there on a version is a list of tensors of the same shapes as the draft's, and a swap a copy of each.

There are two slots: the incumbent's, and the other one's, which is the candidate or, after a swap, the predecessor:
going back to it reads nothing. All memory is taken at start, for allocating it stops the device. Tensors whose
storage is the target's (the embedding table, a shared lm_head) are left out, so no payload can reach them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from onlinespec.plugin.device import Device, Event

_NUM_SLOTS = 2


class Slot:
    """One version's tensors. holds: which; None while it is written, or where it was never. ready: they are there.
    read: the last copy out of them has been made. is_checked: a copy out of them stood between two checksums."""

    def __init__(self, tensors: list[torch.Tensor], now: Event):
        self.tensors = tensors
        self.holds: Any = None
        self.ready = now
        self.read = now
        self.is_checked = False


class Weights:
    """The parameters of one rank's draft and their two slots.

    model: SGLang 0.5.23 models/llama_eagle3.py LlamaForCausalLMEagle3. target: the model whose storage is left alone.
    reserve_bytes: device memory to leave free; slots that would take of it are pinned host memory instead, both: a
    switchback compares what steps cost, and copies are part of them.
    """

    def __init__(self, model: Any, target: Any, device: Device, reserve_bytes: int):
        self._model = model
        self._device = device
        theirs = {tensor.untyped_storage().data_ptr() for tensor in target.parameters()}
        theirs.add(model.model.embed_tokens.weight.untyped_storage().data_ptr())
        self._parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.untyped_storage().data_ptr() not in theirs
        }
        self.own = [parameter.data for parameter in self._parameters.values()]
        self._loading = self._pinned()
        torch._foreach_copy_(self._loading, self.own)  # a tensor that no version carries stays what it is
        free_bytes, num_bytes = device.free_bytes(), sum(tensor.nbytes for tensor in self.own)
        self.are_on_device = free_bytes is None or free_bytes - _NUM_SLOTS * num_bytes >= reserve_bytes
        """the slots; else in pinned host memory"""
        self.slots = [self._slot() for _ in range(_NUM_SLOTS)]
        self._ready: Event = device.mark()

    def _pinned(self) -> list[torch.Tensor]:
        return [self._device.pinned(tensor.shape, tensor.dtype) for tensor in self.own]

    def _slot(self) -> Slot:
        tensors = [torch.empty_like(tensor) for tensor in self.own] if self.are_on_device else self._pinned()
        torch._foreach_copy_(tensors, self.own)
        return Slot(tensors, self._device.mark())

    def fill(self, slot: Slot, weights: dict[str, torch.Tensor], holds: Any) -> None:
        """On a thread of ours: from host tensors of canonical names into the slot, behind the last copy out of it."""
        self._ready.wait()  # what was loaded last has left for its slot
        slot.holds, slot.is_checked = None, False
        stand_in = _StandIn(self._model, self._parameters, self._loading)
        type(self._model).load_weights(stand_in, list(weights.items()))
        slot.read.wait()  # on this host: a slot in its memory is written by this thread, and would be read half new
        self._ready = slot.ready = self._device.copy_aside(
            list(zip(slot.tensors, self._loading, strict=True)), after=slot.read
        )
        slot.holds = holds

    def install(self, slot: Slot) -> None:
        """The slot's tensors into the draft's own, on the current stream; this thread does not wait."""
        self._device.follow(slot.ready)
        self._device.copy(self.own, slot.tensors)
        slot.read = self._device.mark()


class _StandIn:
    """Stands for the model in its own `load_weights`, with other storage under its parameters."""

    def __init__(self, model: Any, parameters: dict[str, torch.Tensor], storage: Sequence[torch.Tensor]):
        self._model = model
        self._mirrors = {
            name: _mirror(parameter, tensor)
            for (name, parameter), tensor in zip(parameters.items(), storage, strict=True)
        }

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._mirrors.items())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _mirror(parameter: torch.Tensor, storage: torch.Tensor) -> torch.Tensor:
    """A parameter of the same class and attributes (weight_loader, output_dim, ...) on other storage.

    Source: SGLang 0.5.23 layers/parameter.py BasevLLMParameter.__new__ is made the same way.
    """
    mirror = torch.Tensor._make_subclass(type(parameter), storage, False)
    mirror.__dict__.update(vars(parameter))
    return mirror
