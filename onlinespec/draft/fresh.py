"""A fresh draft for a target: `--draft init`.

lm_head and the final norm start as copies of the target's: a random head costs a third of the accept
length early on. The rest is seeded noise. Only the tensors needed are read from the target's files.
"""

from pathlib import Path

import torch
from safetensors import safe_open

from onlinespec.draft.config import DraftConfig, TargetFacts, read_target
from onlinespec.draft.header import aux_layers, canonical_names, read_header
from onlinespec.errors import CheckpointError

_PREFIXES = ("model.", "language_model.model.", "model.language_model.")


def fresh_config(target: TargetFacts, source: Path | str = "the target") -> DraftConfig:
    """One layer in the target's own shape, over SGLang's three default captures, with the whole vocabulary.

    Raises: CheckpointError where the target has so few layers that two of the captures are one.
    """
    config = DraftConfig(
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        vocab_size=target.vocab_size,
        draft_vocab_size=target.vocab_size,
        rms_norm_eps=target.rms_norm_eps,
        rope_theta=target.rope_theta,
        max_position_embeddings=target.max_position_embeddings,
        rope_llama3=target.rope_llama3,
        dtype=target.dtype,
    )
    layers = aux_layers(config, target.num_layers)
    if target.num_layers < 7 or len(set(layers)) != 3:
        raise CheckpointError(
            f"{source}: num_hidden_layers is {target.num_layers}, wanted at least 7 for a fresh draft: SGLang would "
            f"capture the layers {layers}, of which two are one; serve a deeper target"
        )
    return config


def build_fresh_draft(target_path: Path | str, seed: int) -> tuple[DraftConfig, dict[str, torch.Tensor]]:
    """Config and float32 weights of a fresh draft, the same for the same seed.

    Raises: CheckpointError where the target lacks a field or a tensor, or has too few layers.
    """
    target = read_target(target_path)
    config = fresh_config(target, Path(target_path))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in canonical_names(config).items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
        else:
            weights[name] = torch.randn(shape, generator=generator) * shape[1] ** -0.5
    weights["norm.weight"] = _read_tensor(target_path, "norm.weight", (config.hidden_size,))
    if target.is_tied:
        weights["lm_head.weight"] = read_embedding(target_path)
    else:
        shape = (config.vocab_size, config.hidden_size)
        weights["lm_head.weight"] = _read_tensor(target_path, "lm_head.weight", shape, prefixes=("", *_PREFIXES))
    return config, {name: tensor.float() for name, tensor in weights.items()}


def read_embedding(target_path: Path | str) -> torch.Tensor:
    """The target's embedding table, in the dtype of its file. Shapes: [V, D].

    Raises: CheckpointError where no file holds it.
    """
    target = read_target(target_path)
    return _read_tensor(target_path, "embed_tokens.weight", (target.vocab_size, target.hidden_size))


def _read_tensor(
    path: Path | str, name: str, shape: tuple[int, ...], prefixes: tuple[str, ...] = _PREFIXES
) -> torch.Tensor:
    """One tensor out of the *.safetensors of a directory, sharded or not."""
    wanted = [prefix + name for prefix in prefixes]
    for file in sorted(Path(path).glob("*.safetensors")):
        tensors = read_header(file)
        for full_name in wanted:
            if full_name not in tensors:
                continue
            if tensors[full_name].shape != shape:
                raise CheckpointError(
                    f"{file}: {full_name} has shape {list(tensors[full_name].shape)}, its config.json says "
                    f"{list(shape)}; download the target again"
                )
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(full_name)
    raise CheckpointError(f"{path}: no *.safetensors holds {wanted[0]}; complete the download of the target")
