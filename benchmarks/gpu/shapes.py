"""A target of Llama-3.1-8B's shape with random weights, for what costs time and memory: no weights can be had there.

Its tokenizer is the demo world's with tokens added up to the vocabulary, so that the server speaks its usual API. What
it says is noise: an accept length of it means nothing. OUT/draft is the shape of a draft for it, as `--draft init:`
wants it: a part of the vocabulary, and the map that says which. OUT/prompts.jsonl: prompts of 512 tokens.

Run: python benchmarks/gpu/shapes.py OUT [--size 8b|tiny]; 16 GB for 8b. tiny is for trying the scripts.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from onlinespec.world import WORLD
from onlinespec.world.corpus import DOMAINS, prompts

SIZES = {
    "8b": {"hidden": 4096, "ffn": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "vocab": 128256},
    "tiny": {"hidden": 64, "ffn": 128, "layers": 8, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 2048},
}
STD = 0.02
DRAFT_VOCAB_FRAC = 0.25
NUM_PROMPTS = 2000
PROMPT_TOKENS = 512
"""the chat template's few not counted"""


def config_of(size: dict[str, int]) -> dict[str, object]:
    """Source: the public config.json of Llama-3.1-8B."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size["hidden"],
        "intermediate_size": size["ffn"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"],
        "head_dim": size["head_dim"],
        "hidden_act": "silu",
        "vocab_size": size["vocab"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def tensors_of(size: dict[str, int], layer: int | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one decoder layer, or of what is outside them."""
    d, q, kv = size["hidden"], size["heads"] * size["head_dim"], size["kv_heads"] * size["head_dim"]
    if layer is None:
        return {
            "model.embed_tokens.weight": (size["vocab"], d),
            "model.norm.weight": (d,),
            "lm_head.weight": (size["vocab"], d),
        }
    shapes = {
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (size["ffn"], d),
        "mlp.up_proj": (size["ffn"], d),
        "mlp.down_proj": (d, size["ffn"]),
    }
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def write_target(out: Path, size: dict[str, int]) -> None:
    """A directory that SGLang loads; one file a layer."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config_of(size), indent=1))
    write_tokenizer(out, size["vocab"])
    parts = [None, *range(size["layers"])]
    names: dict[str, str] = {}
    for number, layer in enumerate(parts):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        shapes = tensors_of(size, layer)
        save_file(dict(random_tensors(shapes, seed=number)), out / file, metadata={"format": "pt"})
        names |= dict.fromkeys(shapes, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in shapes.items():
        values = torch.ones(shape) if len(shape) == 1 else STD * torch.randn(shape, generator=generator, device=device)
        yield name, values.to("cpu", torch.bfloat16)


def write_tokenizer(out: Path, vocab_size: int) -> None:
    """The world's, and one token more for every id that it lacks."""
    for file in WORLD.glob("*token*"):
        shutil.copyfile(file, out / file.name)
    tokenizer = json.loads((WORLD / "tokenizer.json").read_text())
    added = tokenizer["added_tokens"]
    used = len(tokenizer["model"]["vocab"].keys() | {token["content"] for token in added})
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    added += [{"id": i, "content": f"<x{i}>", **flags} for i in range(used, vocab_size)]
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))


def write_draft_shape(out: Path, size: dict[str, int]) -> None:
    """One layer of the target's own shape over the first quarter of its tokens."""
    out.mkdir()
    draft_vocab = int(DRAFT_VOCAB_FRAC * size["vocab"])
    config = {
        **config_of(size),
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": draft_vocab,
    }
    (out / "config.json").write_text(json.dumps(config, indent=1))
    save_file({"d2t": torch.zeros(draft_vocab, dtype=torch.int64)}, out / "map.safetensors")  # offsets, not ids


def write_prompts(out: Path) -> None:
    """Questions of the world one after another, cut at PROMPT_TOKENS tokens; no two begin alike."""
    tokenizer = Tokenizer.from_file(str(WORLD / "tokenizer.json"))
    streams = [prompts(domain, seed=1) for domain in DOMAINS]
    with out.open("w") as file:
        for number in range(NUM_PROMPTS):
            ids = tokenizer.encode(f"{number}.").ids
            while len(ids) < PROMPT_TOKENS:
                ids += tokenizer.encode(next(streams[number % len(streams)]) + "\n").ids
            file.write(json.dumps({"prompt": tokenizer.decode(ids[:PROMPT_TOKENS])}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="8b")
    options = parser.parse_args()
    write_target(options.out, SIZES[options.size])
    write_draft_shape(options.out / "draft", SIZES[options.size])
    write_prompts(options.out / "prompts.jsonl")


if __name__ == "__main__":
    main()
