"""Draft checkpoints on disk: config.json beside model.safetensors, the form SGLang loads.

What is read is checked first by its header (see `header`), then by its values.

W draft vocabulary.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from onlinespec.draft.config import CONFIG_FILE, DraftConfig, read_draft_config
from onlinespec.draft.header import WEIGHTS_FILE, canonical_name, canonical_names, check_names, read_header
from onlinespec.errors import CheckpointError


def read_draft(path: Path | str) -> tuple[DraftConfig, dict[str, torch.Tensor]]:
    """A draft directory's config and tensors, on the CPU, in the dtype of the file, by their canonical names.

    Raises: CheckpointError where anything is missing, unknown, of another shape or dtype, or not finite.
    """
    folder = Path(path)
    config = read_draft_config(folder)
    file = folder / WEIGHTS_FILE
    check_names(file, read_header(file), config)
    wanted = canonical_names(config)
    spelt = {canonical_name(name): tensor for name, tensor in load_file(file).items()}
    weights = {name: tensor for name, tensor in spelt.items() if name in wanted}
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{file}: {name} holds {int((~torch.isfinite(tensor)).sum())} values that are not finite, wanted "
                f"none; go back to an earlier version"
            )
    if config.is_pruned:
        target_ids(file, config, weights["d2t"])
    elif "d2t" in spelt and bool(spelt["d2t"].any()):
        raise CheckpointError(
            f"{file}: d2t maps to other ids, which SGLang would follow, and config.json has the whole vocabulary; "
            f"remove it from the file, or set draft_vocab_size to its length"
        )
    return config, weights


def target_ids(source: Path | str, config: DraftConfig, d2t_W: torch.Tensor) -> torch.Tensor:
    """The target's id of each draft id, from their offsets; `source` names the file in errors.

    Shapes: int64 [W] to int64 [W].

    Raises: CheckpointError where two draft ids are one target id, or an id is none of the target's.
    """
    ids_W = d2t_W + torch.arange(config.draft_vocab_size)
    if int(ids_W.min()) < 0 or int(ids_W.max()) >= config.vocab_size or ids_W.unique().numel() != ids_W.numel():
        raise CheckpointError(
            f"{source}: d2t maps to ids {int(ids_W.min())} to {int(ids_W.max())}, wanted {ids_W.numel()} distinct ones "
            f"below {config.vocab_size}; d2t holds offsets (target id - draft id), not ids"
        )
    return ids_W


def unsound_reason(
    weights: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], maps: Mapping[str, torch.Tensor]
) -> str | None:
    """Say why weights must not take the place of those in service; None where they may.

    shapes: of the draft in service, by name. They are the allow-list: `embed_tokens`, the target's own table, is not
    among them. maps: its `d2t` and `t2d` as far as they are known; SGLang reads them once, at start.
    """
    if extra := sorted(weights.keys() - shapes.keys()):
        return f"it has the tensor {extra[0]}, which the draft in service has not"
    if missing := sorted(shapes.keys() - weights.keys()):
        return f"it lacks the tensor {missing[0]}"
    for name, tensor in weights.items():
        if tuple(tensor.shape) != shapes[name]:
            return f"{name} has shape {tuple(tensor.shape)}, the draft in service {shapes[name]}"
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} has values that are not finite"
    for name, served in maps.items():
        if not torch.equal(weights[name], served):
            return f"it has another {name} than the draft in service"
    return None


def write_draft(path: Path | str, config: DraftConfig, weights: dict[str, torch.Tensor]) -> None:
    """Write config.json and model.safetensors into a directory, made where it is missing. No fsync.

    Raises: CheckpointError where the names or shapes are not those of the config.
    """
    wanted = canonical_names(config)
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != wanted and {**found, "t2d": wanted.get("t2d")} != wanted:
        name = sorted(set(found.items()) ^ set(wanted.items()))[0][0]
        raise CheckpointError(
            f"{path}: {name} has shape {found.get(name)}, wanted {wanted.get(name)}; nothing was written"
        )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config.to_json(), indent=2) + "\n")
