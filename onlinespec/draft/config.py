"""What a draft and a target are, read from their config.json. No torch: `serve` refuses before heavy imports.

The fields of `DraftConfig` are those of SGLang's `LlamaForCausalLMEagle3` that change its numbers; a value
that we do not reproduce is refused here, so that the trainer never learns for another model than the one
that is served.

Aux layers on or off. Normally the draft reads `fc` of several captured hidden states. SGLang leaves `fc` and
the norms before it out where what it is fed is already as wide as the draft, which happens in two ways:
`eagle_config.use_aux_hidden_state: false`, where nothing is captured and the draft reads what the target's
own lm_head reads (after the final norm: what EAGLE, without 3, trained on), and a single captured layer. The
server feeds the tap from the same tensor as the draft, so rows then carry that state.

Source: sglang 0.5.23, srt/model_executor/model_runner_components/spec_aux_hidden_state.py,
_resolve_eagle_aux_hidden_state; srt/layers/logits_processor.py, _get_hidden_states_to_store;
srt/models/llama_eagle3.py, LlamaModel.forward.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onlinespec.errors import CheckpointError

ARCHITECTURE = "LlamaForCausalLMEagle3"
CONFIG_FILE = "config.json"
_OTHER_ARCHITECTURES = {
    "LlamaForCausalLMEagle": "that is EAGLE, not EAGLE-3",
    "Qwen2ForCausalLMEagle": "that is EAGLE, not EAGLE-3",
    "MistralForCausalLMEagle": "that is EAGLE, not EAGLE-3",
    "Eagle3DeepseekV2ForCausalLM": "multi-head latent attention is not reproduced",
}
_OTHER_DECODERS = {
    "llama4_text": "SGLang gives that layer an MLP of intermediate_size_mlp: write llama, and that width as"
    " intermediate_size",
}


@dataclass(frozen=True)
class DraftConfig:
    """Shape and numerics of an EAGLE-3 draft.

    Source: sglang 0.5.23, srt/models/llama_eagle3.py, LlamaModel and LlamaForCausalLMEagle3.
    """

    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    """rows of lm_head; equal to vocab_size where the vocabulary is not pruned"""
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    num_layers: int = 1
    """decoder layers; the first reads embedding and hidden state, the others the hidden state of the one below"""
    num_aux: int = 3
    """target hidden states read per row; 1 where use_aux is False"""
    aux_layers: tuple[int, ...] | None = None
    """target layers whose output is read; None means SGLang's default, the inputs of 2, n//2 and n-3"""
    use_aux: bool = True
    """False: nothing is captured, the draft reads the target's last hidden state, after its final norm"""
    rope_llama3: tuple[float, float, float, int] | None = None
    """factor, low and high frequency factor, original positions; None means plain RoPE"""
    norm_output: bool = False
    """later steps read the normed hidden state instead of the one before the norm"""
    fc_norm: bool = False
    """each captured state has its own norm before fc"""
    norm_before_fc: bool = False
    """one norm over all captured states before fc"""
    dtype: str = "float32"
    """what `--dtype auto` serves the draft in"""

    def __post_init__(self) -> None:
        assert self.use_aux or (self.num_aux, self.aux_layers) == (1, None), "without aux layers, one state is read"
        assert self.has_fc or not (self.fc_norm or self.norm_before_fc), "these norms stand before fc"

    @property
    def has_fc(self) -> bool:
        """What is read is wider than the draft, so SGLang puts fc and the norms before it in front."""
        return self.num_aux * self.target_hidden_size != self.hidden_size

    @property
    def is_pruned(self) -> bool:
        """The draft speaks a part of the target's vocabulary; d2t maps its ids."""
        return self.draft_vocab_size < self.vocab_size

    def to_json(self) -> dict[str, Any]:
        """The config.json that SGLang loads.

        `draft_vocab_size` is always written: without it SGLang shares the target's own lm_head with the
        draft, and a swap would overwrite it.
        """
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_llama3 is not None:
            factor, low, high, original = self.rope_llama3
            rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low}
            rope |= {"high_freq_factor": high, "original_max_position_embeddings": original}
        raw: dict[str, Any] = {
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "target_hidden_size": self.target_hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "draft_vocab_size": self.draft_vocab_size,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": rope,
            "max_position_embeddings": self.max_position_embeddings,
            "num_aux_hidden_states": self.num_aux,
            "norm_output": self.norm_output,
            "fc_norm": self.fc_norm,
            "norm_before_fc": self.norm_before_fc,
            "tie_word_embeddings": False,
            "torch_dtype": self.dtype,
        }
        if self.aux_layers is not None:
            raw["eagle_config"] = {
                "eagle_aux_hidden_state_layer_ids": list(self.aux_layers),
                "use_aux_hidden_state": True,
            }
        if not self.use_aux:
            raw["eagle_config"] = {"use_aux_hidden_state": False}
        return raw


@dataclass(frozen=True)
class TargetFacts:
    """What a draft must agree with, from the target's config.json."""

    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_llama3: tuple[float, float, float, int] | None
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    is_tied: bool
    """the embedding table is the lm_head"""
    dtype: str


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises: CheckpointError where the file is missing or holds anything else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a model directory that holds a {path.name}")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); copy or download it again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: found {type(raw).__name__}, wanted a JSON object; copy it again")
    return raw


def read_target(path: Path | str) -> TargetFacts:
    """Facts of a Hugging Face model directory.

    Raises: CheckpointError where config.json is missing or lacks a field.
    """
    source = Path(path) / CONFIG_FILE
    fields = _Fields(read_json(source), source)
    if isinstance(fields.raw.get("text_config"), dict):
        fields = _Fields(fields.raw["text_config"], source)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    eos = fields.raw.get("eos_token_id")
    theta, llama3, _ = fields.rope()
    return TargetFacts(
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", hidden // heads),
        rms_norm_eps=float(fields.raw.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_llama3=llama3,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        is_tied=bool(fields.raw.get("tie_word_embeddings", False)),
        dtype=fields.dtype(),
    )


def read_draft_config(path: Path | str) -> DraftConfig:
    """The config.json of a draft directory, or a *.json of that form.

    Raises: CheckpointError where it is no EAGLE-3 draft, or of a kind that we do not reproduce.
    """
    source = Path(path)
    source = source if source.suffix == ".json" else source / CONFIG_FILE
    return parse_draft_config(read_json(source), source)


def parse_draft_config(raw: dict[str, Any], source: Path | str) -> DraftConfig:
    """Check and read the fields; `source` names the file in errors.

    Raises: CheckpointError.
    """
    fields = _Fields(raw, source)
    _refuse_foreign(fields)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    target_hidden = fields.integer("target_hidden_size", hidden)
    vocab = fields.integer("vocab_size")
    theta, llama3, rope_type = fields.rope()
    if rope_type not in ("default", "llama3"):
        raise fields.error("rope_type", rope_type, "default or llama3", "retrain the draft with plain RoPE")
    use_aux, layers, num_aux = _read_aux(fields)
    has_fc = num_aux * target_hidden != hidden
    eagle = raw.get("eagle_config") or {}
    config = DraftConfig(
        hidden_size=hidden,
        target_hidden_size=target_hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", hidden // heads),
        vocab_size=vocab,
        draft_vocab_size=fields.integer("draft_vocab_size", vocab),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_llama3=llama3,
        max_position_embeddings=fields.integer("max_position_embeddings", 2048),
        num_layers=fields.integer("num_hidden_layers", 1),
        num_aux=num_aux,
        aux_layers=layers,
        use_aux=use_aux,
        norm_output=bool(raw.get("norm_output", False)),
        fc_norm=has_fc and bool(raw.get("fc_norm") or raw.get("use_aux_norm", False)),
        norm_before_fc=has_fc and bool(eagle.get("norm_before_fc", raw.get("norm_before_fc", False))),
        dtype=fields.dtype(),
    )
    _check_consistent(config, fields)
    return config


def _read_aux(fields: "_Fields") -> tuple[bool, tuple[int, ...] | None, int]:
    """use_aux, aux_layers and num_aux, by SGLang's own precedence.

    Source: sglang 0.5.23, _resolve_eagle_aux_hidden_state; srt/models/llama_eagle3.py, LlamaModel.__init__.
    """
    raw, name = fields.raw, "eagle_aux_hidden_state_layer_ids"
    eagle = raw.get("eagle_config") or {}
    if not eagle.get("use_aux_hidden_state", True):
        return False, None, 1
    layers = eagle.get(name)
    if layers is None and raw.get(name) is not None:
        advice = "SGLang reads it nowhere else and would capture its default layers: move it"
        raise fields.error(name, f"{raw[name]} at top level", "it inside eagle_config", advice)
    if layers is not None and not (layers and all(type(layer) is int for layer in layers)):
        raise fields.error(f"eagle_config.{name}", layers, "a list of layers", "leave it out for SGLang's default")
    num_aux = fields.integer("num_aux_hidden_states", len(layers) if layers else 3)
    return True, tuple(layers) if layers else None, num_aux


def _refuse_foreign(fields: "_Fields") -> None:
    """Refuse what SGLang would load as another model, or what we do not reproduce."""
    raw = fields.raw
    found = raw.get("architectures")
    if found != [ARCHITECTURE]:
        name = str(found[0]) if isinstance(found, list) and found else ""
        advice = "give an EAGLE-3 draft, or start one with --draft init"
        if name in _OTHER_ARCHITECTURES:
            advice = f"{_OTHER_ARCHITECTURES[name]}: {advice}"
        elif "eagle3" in name.lower():
            advice = f"no other decoder is reproduced, and SGLang 0.5.23 may not have it: {advice}"
        raise fields.error("architectures", found, [ARCHITECTURE], advice)
    if "quantization_config" in raw:
        raise fields.error(
            "quantization_config", "a quantised draft", "none", "give the draft in float32, bfloat16 or float16"
        )
    other = "SGLang would fill what is left out with that model's defaults: write llama, with head_dim and rope_theta"
    wanted = {
        "model_type": ("llama", _OTHER_DECODERS.get(str(raw.get("model_type")), other)),
        "hidden_act": ("silu", "SGLang's LlamaMLP takes no other"),
        "tie_word_embeddings": (False, "SGLang would ignore the draft's lm_head; set it to false"),
        "attention_bias": (False, "biases are not reproduced"),
        "bias": (False, "biases are not reproduced"),
        "rope_is_neox_style": (True, "interleaved RoPE is not reproduced"),
        "partial_rotary_factor": (1, "partial RoPE is not reproduced"),
    }
    for name, (value, advice) in wanted.items():
        if raw.get(name, value) != value:
            raise fields.error(name, raw[name], value, advice)


def _check_consistent(config: DraftConfig, fields: "_Fields") -> None:
    if config.draft_vocab_size > config.vocab_size:
        raise fields.error(
            "draft_vocab_size", config.draft_vocab_size, f"at most vocab_size {config.vocab_size}", "fix config.json"
        )
    if config.aux_layers is not None and len(config.aux_layers) != config.num_aux:
        raise fields.error(
            "num_aux_hidden_states",
            config.num_aux,
            f"{len(config.aux_layers)}, the number of eagle_aux_hidden_state_layer_ids",
            "make the two agree",
        )
    if config.num_heads % config.num_kv_heads:
        raise fields.error(
            "num_key_value_heads", config.num_kv_heads, f"a divisor of {config.num_heads}", "fix config.json"
        )


class _Fields:
    """A raw config with its file name, for errors."""

    def __init__(self, raw: dict[str, Any], source: Path | str):
        self.raw = raw
        self.source = source

    def error(self, name: str, found: Any, wanted: Any, advice: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {name} is {found}, wanted {wanted}; {advice}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(name, self.raw.get(name, "missing"), "a positive integer", "fix config.json")
        return value

    def dtype(self) -> str:
        return str(self.raw.get("torch_dtype") or self.raw.get("dtype") or "float32").removeprefix("torch.")

    def rope(self) -> tuple[float, tuple[float, float, float, int] | None, str]:
        """Theta, llama3 scaling or None, and the scaling type; old and new spelling of the config."""
        raw = self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}
        theta = float(raw.get("rope_theta") or self.raw.get("rope_theta") or 10000.0)
        kind = str(raw.get("rope_type") or raw.get("type") or "default")
        if kind != "llama3":
            return theta, None, kind
        original = raw.get("original_max_position_embeddings") or self.integer("max_position_embeddings")
        low, high = float(raw.get("low_freq_factor", 1.0)), float(raw.get("high_freq_factor", 4.0))
        return theta, (float(raw.get("factor", 1.0)), low, high, int(original)), kind
