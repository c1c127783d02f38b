"""A draft checkpoint judged by its header: names, shapes, dtypes, sizes, digests. No torch.

A safetensors file is a little-endian u64 length, that many bytes of JSON (name -> dtype, shape, offsets) and
the data. The header and the file's size are enough to refuse everything but bad values, in milliseconds.

Source: safetensors 0.8, README.md "Format".
"""

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from onlinespec.draft.config import CONFIG_FILE, DraftConfig, TargetFacts, parse_draft_config, read_json
from onlinespec.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
MAP_NAMES = frozenset({"d2t", "t2d"})
_MAX_HEADER_BYTES = 100 * 2**20
_SAMPLE_BYTES = 1024
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOATS = ("F32", "BF16", "F16")
_SPELLINGS = {"layers.0.": "midlayer.", "aux_norm_low.": "fc_norm.0.", "aux_norm_mid.": "fc_norm.1."}
_SPELLINGS["aux_norm_high."] = "fc_norm.2."


@dataclass(frozen=True)
class TensorHeader:
    """One entry: dtype as safetensors spells it, shape, and where its bytes stand in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def canonical_names(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Every name a checkpoint of this draft holds, with its shape: the allow-list of read, write and swap.

    The first decoder layer is `midlayer`, the others `layers.1` and on. `d2t` and `t2d` (int64 offsets and a
    bool mask) are among them only where the vocabulary is pruned.

    Source: sglang 0.5.23, srt/models/llama_eagle3.py.
    """
    dim, aux_dim = config.hidden_size, config.num_aux * config.target_hidden_size
    names: dict[str, tuple[int, ...]] = {"fc.weight": (dim, aux_dim)} if config.has_fc else {}
    names |= {"midlayer.input_layernorm.weight": (dim,)} | _layer_names(config, "midlayer", 2 * dim)
    for i in range(1, config.num_layers):
        names |= _layer_names(config, f"layers.{i}", dim)
    names |= {"norm.weight": (dim,), "lm_head.weight": (config.draft_vocab_size, dim)}
    if config.fc_norm:
        names |= {f"fc_norm.{i}.weight": (config.target_hidden_size,) for i in range(config.num_aux)}
    if config.norm_before_fc:
        names["input_norm.weight"] = (aux_dim,)
    if config.is_pruned:
        names |= {"d2t": (config.draft_vocab_size,), "t2d": (config.vocab_size,)}
    return names


def _layer_names(config: DraftConfig, layer: str, input_dim: int) -> dict[str, tuple[int, ...]]:
    """One decoder layer, without the norm that the first one alone puts on the embedding."""
    dim, ffn_dim = config.hidden_size, config.intermediate_size
    q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        f"{layer}.hidden_norm.weight": (dim,),
        f"{layer}.post_attention_layernorm.weight": (dim,),
        f"{layer}.self_attn.q_proj.weight": (q_dim, input_dim),
        f"{layer}.self_attn.k_proj.weight": (kv_dim, input_dim),
        f"{layer}.self_attn.v_proj.weight": (kv_dim, input_dim),
        f"{layer}.self_attn.o_proj.weight": (dim, q_dim),
        f"{layer}.mlp.gate_proj.weight": (ffn_dim, dim),
        f"{layer}.mlp.up_proj.weight": (ffn_dim, dim),
        f"{layer}.mlp.down_proj.weight": (dim, ffn_dim),
    }


def canonical_name(name: str) -> str:
    """A tensor's name as we write it, from any spelling that SGLang reads.

    Source: sglang 0.5.23, srt/models/llama_eagle3.py, LlamaForCausalLMEagle3.load_weights (legacy_name_map).
    """
    name = name.removeprefix("model.")
    for spelling, ours in _SPELLINGS.items():
        if name.startswith(spelling):
            return ours + name.removeprefix(spelling)
    return name


def is_unread(name: str, config: DraftConfig) -> bool:
    """A tensor that SGLang has a place for and never reads: accepted in a checkpoint, not kept.

    The embedding's norm of every layer but the first, and fc with its norms where SGLang leaves fc out.
    """
    if not config.has_fc and name.split(".")[0] in ("fc", "fc_norm", "input_norm"):
        return True
    return name in {f"layers.{i}.input_layernorm.weight" for i in range(1, config.num_layers)}


def aux_layers(config: DraftConfig, num_layers: int) -> list[int]:
    """Layers of the target whose *input* SGLang captures, in the order of a row. Empty where use_aux is False.

    The one place where ids meet layers. An id in config.json names a layer by its output, as training does;
    SGLang captures what a layer is given, so the output of layer i is taken at layer i + 1, and -1 is the
    embedding. The default's three are inputs already. SGLang captures while it goes through the layers, so a
    row is in ascending order whatever the order of the ids. (For a gpt-oss target SGLang does not add 1 where
    the largest id is num_layers; `check_fit` refuses such ids.)

    Source: sglang 0.5.23, srt/models/llama.py, LlamaForCausalLM.set_eagle3_layers_to_capture.
    """
    if not config.use_aux:
        return []
    if config.aux_layers is None:
        return sorted([2, num_layers // 2, num_layers - 3])
    return sorted(layer + 1 for layer in config.aux_layers)


def read_header(file: Path | str) -> dict[str, TensorHeader]:
    """The tensors of a safetensors file.

    Raises: CheckpointError where the file is missing, truncated, or no safetensors file.
    """
    file = Path(file)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give a directory that holds {WEIGHTS_FILE}, unsharded")
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES
        if 8 + length > size:
            raise CheckpointError(f"{file}: truncated: {size} bytes end before the header does; copy it again")
        if length > _MAX_HEADER_BYTES:
            raise CheckpointError(f"{file}: not a safetensors file (header of {length} bytes); convert it")
        raw = stream.read(length)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        tensors = {name: _tensor_header(entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a safetensors file (header: {error!r}); convert it") from error
    _check_sizes(file, tensors, size, 8 + length)
    return tensors


def _tensor_header(entry: dict, data_start: int) -> TensorHeader:
    start, end = entry["data_offsets"]
    return TensorHeader(str(entry["dtype"]), tuple(entry["shape"]), data_start + start, data_start + end)


def _check_sizes(file: Path, tensors: dict[str, TensorHeader], size: int, data_start: int) -> None:
    wanted = max((tensor.end for tensor in tensors.values()), default=data_start)
    if size != wanted:
        what = "truncated" if size < wanted else "too long"
        raise CheckpointError(f"{file}: {what}: found {size} bytes, its header wants {wanted}; copy it again")
    for name, tensor in tensors.items():
        width = _DTYPE_BYTES.get(tensor.dtype)
        num_bytes = tensor.end - tensor.start
        if width is not None and num_bytes != width * math.prod(tensor.shape):
            raise CheckpointError(
                f"{file}: {name} {tensor.dtype} {list(tensor.shape)} spans {num_bytes} bytes, "
                f"wanted {width * math.prod(tensor.shape)}; copy it again"
            )


def check_names(file: Path | str, tensors: dict[str, TensorHeader], config: DraftConfig) -> None:
    """Hold a header against the allow-list, whatever the spelling of its names.

    Raises: CheckpointError naming the first tensor that is unknown, missing, or of another shape or dtype.
    """
    wanted = canonical_names(config)
    spelt = {name: canonical_name(name) for name in tensors}
    embeds = [name for name in tensors if "embed_tokens" in name]
    if embeds:
        raise CheckpointError(
            f"{file}: holds {embeds[0]}, which is the target's own table in the server and would overwrite it; "
            f"remove it from the file"
        )
    known = wanted.keys() | MAP_NAMES
    unknown = sorted(name for name, ours in spelt.items() if ours not in known and not is_unread(ours, config))
    missing = sorted(wanted.keys() - set(spelt.values()) - {"t2d"})
    twice = sorted(name for name, ours in spelt.items() if name != ours and ours in tensors)
    if unknown:
        raise CheckpointError(
            f"{file}: unknown tensor {unknown[0]} ({len(unknown)} unknown in all), which SGLang would skip "
            f"silently; rename or remove it"
        )
    if missing:
        raise CheckpointError(
            f"{file}: {missing[0]} is missing ({len(missing)} missing in all); export the draft again"
        )
    if twice:
        raise CheckpointError(f"{file}: holds {twice[0]} and {spelt[twice[0]]}, two names of one tensor; remove one")
    for name, tensor in tensors.items():
        if spelt[name] in wanted:
            _check_tensor(file, spelt[name], tensor, wanted[spelt[name]])


def _check_tensor(file: Path | str, name: str, tensor: TensorHeader, shape: tuple[int, ...]) -> None:
    dtypes = {"d2t": ("I64",), "t2d": ("BOOL",)}.get(name, _FLOATS)
    if tensor.dtype not in dtypes:
        is_quantised = dtypes is _FLOATS and tensor.dtype != "F64"
        what = "quantised drafts cannot be trained; give" if is_quantised else "convert it to"
        raise CheckpointError(
            f"{file}: {name} has dtype {tensor.dtype}, wanted {' or '.join(dtypes)}; {what} {dtypes[0]}"
        )
    if tensor.shape != shape:
        advice = "num_aux_hidden_states or the layer ids in config.json are wrong" if name == "fc.weight" else ""
        raise CheckpointError(
            f"{file}: {name} has shape {list(tensor.shape)}, config.json wants {list(shape)}; "
            f"{advice or 'give the config.json that belongs to these weights'}"
        )


def check_fit(source: Path | str, config: DraftConfig, target: TargetFacts, context_tokens: int | None) -> None:
    """Hold a draft's config against its target and the serving context.

    context_tokens: longest sequence the server will serve; None means the target's own limit.

    Raises: CheckpointError naming the field, what was found and what was wanted.
    """

    def refuse(name: str, found: object, wanted: object, advice: str) -> None:
        raise CheckpointError(f"{source}: {name} is {found}, wanted {wanted}; {advice}")

    another = "give a draft made for this target, or start one with --draft init"
    if config.target_hidden_size != target.hidden_size:
        refuse("target_hidden_size", config.target_hidden_size, f"the target's {target.hidden_size}", another)
    if config.hidden_size != target.hidden_size:
        refuse(
            "hidden_size", config.hidden_size, f"the target's {target.hidden_size}, whose embedding it shares", another
        )
    if config.vocab_size != target.vocab_size:
        refuse("vocab_size", config.vocab_size, f"the target's {target.vocab_size}", another)
    layers = aux_layers(config, target.num_layers)
    is_captured = len(set(layers)) == config.num_aux and all(0 <= layer < target.num_layers for layer in layers)
    if config.use_aux and not is_captured:
        # A layer named twice, or past the last, is captured once or never: fc would get too few features.
        refuse(
            "eagle_config.eagle_aux_hidden_state_layer_ids",
            "the default" if config.aux_layers is None else list(config.aux_layers),
            f"{config.num_aux} distinct layers from -1 to {target.num_layers - 2}",
            f"SGLang would capture the inputs of layers {sorted(set(layers))} of {target.num_layers}",
        )
    context = target.max_position_embeddings if context_tokens is None else context_tokens
    if config.max_position_embeddings < context:
        refuse(
            "max_position_embeddings",
            config.max_position_embeddings,
            f"at least the serving context of {context} tokens",
            f"set it to {context} or serve with --context-length {config.max_position_embeddings}",
        )


def check_same_shape(source: Path | str, config: DraftConfig, served: DraftConfig, num_layers: int) -> None:
    """Hold a draft's config against that of the draft in service, which its weights are to replace. num_layers: of
    the target. Layers count as the same however their ids are spelt; the dtype of the file is free.

    Raises: CheckpointError naming the first field that differs.
    """
    ours, theirs = ({**vars(each), "aux_layers": aux_layers(each, num_layers)} for each in (config, served))
    for name, found in ours.items():
        if found != theirs[name] and name != "dtype":
            what = "aux_layers (inputs captured)" if name == "aux_layers" else name
            raise CheckpointError(
                f"{source}: {what} is {found}, the draft in service has {theirs[name]}; train it in that shape, or "
                f"start a server with it by --draft"
            )


def check_draft(path: Path | str, target: TargetFacts, context_tokens: int | None = None) -> DraftConfig:
    """Everything that can be said of a draft directory without torch.

    Raises: CheckpointError, one line: file and field, found, wanted, the next thing to try.
    """
    source, weights = Path(path) / CONFIG_FILE, Path(path) / WEIGHTS_FILE
    raw = read_json(source)
    config = parse_draft_config(raw, source)
    if raw.get("draft_vocab_size") is None:
        raise CheckpointError(
            f"{source}: draft_vocab_size is missing, wanted {config.draft_vocab_size}: without it SGLang shares "
            f"the target's lm_head with the draft and a swap would overwrite it; add it"
        )
    check_fit(source, config, target, context_tokens)
    check_names(weights, read_header(weights), config)
    return config


def read_shapes(path: Path | str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a draft directory's tensors.

    Raises: CheckpointError where model.safetensors is missing or damaged.
    """
    return {name: tensor.shape for name, tensor in read_header(Path(path) / WEIGHTS_FILE).items()}


def digest_of_bytes(data: bytes) -> str:
    """SHA-256, in hex, of the bytes of a model.safetensors."""
    return hashlib.sha256(data).hexdigest()


def digest(path: Path | str) -> str:
    """SHA-256, in hex, of a draft directory's model.safetensors.

    Raises: CheckpointError where there is none.
    """
    file = Path(path) / WEIGHTS_FILE
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give the directory of a draft")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def target_digest(path: Path | str) -> str:
    """A cheap SHA-256 of a target: cheap enough for every start, different for every fine-tune.

    Over config.json, and for every *.safetensors in order of name: its name, its size, its header, and 1 KiB
    from the beginning and 1 KiB from the middle of each tensor. A change that misses all those bytes is not
    seen; one training step changes all of them.

    Raises: CheckpointError where config.json or every weight file is missing.
    """
    folder = Path(path)
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / CONFIG_FILE).is_file() or not files:
        raise CheckpointError(f"{folder}: no config.json with *.safetensors; give a downloaded model directory")
    sha = hashlib.sha256((folder / CONFIG_FILE).read_bytes())
    for file in files:
        tensors = read_header(file)
        data_start = min((tensor.start for tensor in tensors.values()), default=8)
        with file.open("rb") as stream:
            sha.update(f"{file.name} {file.stat().st_size}".encode())
            sha.update(stream.read(data_start))
            for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
                for start in (tensor.start, (tensor.start + tensor.end) // 2):
                    stream.seek(start)
                    sha.update(stream.read(min(_SAMPLE_BYTES, tensor.end - start)))
    return sha.hexdigest()
