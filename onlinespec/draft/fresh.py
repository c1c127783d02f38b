"""A fresh draft for a target: `--draft init`, or `--draft init:CONFIG` in a shape of your own.

lm_head and the final norm start as copies of the target's: a random head costs a third of the accept
length early on. The rest is seeded noise. Only the tensors needed are read from the target's files.

W draft vocabulary, V target vocabulary, D model dim.
"""

from pathlib import Path

import torch
from safetensors import safe_open

from onlinespec.draft.checkpoint import target_ids
from onlinespec.draft.config import DraftConfig, TargetFacts, read_draft_config, read_target
from onlinespec.draft.header import aux_layers, canonical_names, check_fit, read_header
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


def build_fresh_draft(
    target_path: Path | str, seed: int, config_path: Path | str | None = None, context_tokens: int | None = None
) -> tuple[DraftConfig, dict[str, torch.Tensor]]:
    """Config and float32 weights, ready for `write_draft`. The same seed gives the same weights.

    config_path: a draft's *.json, or a directory that holds its config.json; None means `fresh_config`. A
    pruned vocabulary takes its map (`d2t`) from a *.safetensors in the same directory. context_tokens: as in
    `check_fit`.

    Raises: CheckpointError where the config does not fit the target, a pruned vocabulary has no map, or the
    target's files lack a tensor.
    """
    target = read_target(target_path)
    if config_path is None:
        config = fresh_config(target, target_path)
    else:
        config = read_draft_config(config_path)
        check_fit(config_path, config, target, context_tokens)
    weights = {
        "norm.weight": _read_tensor(target_path, "norm.weight", (config.hidden_size,)).float(),
        "lm_head.weight": _read_head(target_path, target).float(),
    }
    if config.is_pruned:
        assert config_path is not None, "the target's own vocabulary is whole"
        weights["d2t"] = _read_map(Path(config_path), config)
        ids_W = target_ids(config_path, config, weights["d2t"])
        weights["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, ids_W, True)
        weights["lm_head.weight"] = weights["lm_head.weight"][ids_W]
    generator = torch.Generator().manual_seed(seed)
    for name, shape in canonical_names(config).items():
        if name in weights:
            continue
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
        else:
            weights[name] = torch.randn(shape, generator=generator) * shape[1] ** -0.5
    return config, weights


def _read_head(target_path: Path | str, target: TargetFacts) -> torch.Tensor:
    """The target's lm_head. Shapes: [V, D]."""
    if target.is_tied:
        return read_embedding(target_path)
    shape = (target.vocab_size, target.hidden_size)
    return _read_tensor(target_path, "lm_head.weight", shape, prefixes=("", *_PREFIXES))


def _read_map(config_path: Path, config: DraftConfig) -> torch.Tensor:
    """d2t from a *.safetensors beside the config. Shapes: int64 [W]."""
    folder = config_path.parent if config_path.suffix == ".json" else config_path
    for file in sorted(folder.glob("*.safetensors")):
        header = read_header(file).get("d2t")
        if header is not None and header.shape == (config.draft_vocab_size,):
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor("d2t").long()
    raise CheckpointError(
        f"{config_path}: draft_vocab_size is {config.draft_vocab_size} of {config.vocab_size} and no *.safetensors "
        f"beside it holds a d2t of that length, which says what tokens those are; put the model.safetensors of a "
        f"draft with that vocabulary there, or set draft_vocab_size to {config.vocab_size}"
    )


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
