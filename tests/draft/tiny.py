"""Tiny drafts, targets and samples, and the draft as an explicit loop over single tokens.

T tokens, A captured layers, D model dim, V vocabulary, k teacher top-k.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from onlinespec.draft.config import DraftConfig
from onlinespec.draft.model import Draft
from onlinespec.draft.sample import Sample, VerifySteps

CONFIG = DraftConfig(
    hidden_size=16,
    target_hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=29,
    draft_vocab_size=29,
    rms_norm_eps=1e-5,
    rope_theta=1000.0,
    max_position_embeddings=128,
)
TARGET_JSON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "vocab_size": 29,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    "max_position_embeddings": 128,
    "eos_token_id": [3, 4],
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def build_draft(seed: int = 0, **changes: Any) -> Draft:
    """A draft with weights large enough that every part of it shows in the logits."""
    config = replace(CONFIG, **changes)
    torch.manual_seed(seed)
    draft = Draft(config)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    if config.is_pruned:
        ids = torch.randperm(config.vocab_size)[: config.draft_vocab_size].sort().values
        mask = torch.zeros(config.vocab_size, dtype=torch.bool)
        mask[ids] = True
        draft.load_weights(draft.weights() | {"d2t": ids - torch.arange(len(ids)), "t2d": mask})
    return draft


def build_embedding(seed: int = 0, config: DraftConfig = CONFIG) -> torch.Tensor:
    """A target's table. Shapes: [V, D]."""
    return torch.randn(config.vocab_size, config.hidden_size, generator=torch.Generator().manual_seed(seed))


def build_sample(
    seed: int = 0,
    num_prompt: int = 6,
    num_answer: int = 9,
    temperature: float = 0.0,
    top_k: int = 4,
    config: DraftConfig = CONFIG,
    ended_s: float = 0.0,
    request: int | None = None,
) -> Sample:
    """A complete request of noise: teachers from the last prompt row on, no row for the last token."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = num_prompt + num_answer
    aux_dim = config.num_aux * config.target_hidden_size
    logits_TV = 2 * torch.randn(num_tokens, config.vocab_size, generator=generator)
    top = logits_TV.topk(top_k)
    has_aux_T = torch.arange(num_tokens) < num_tokens - 1
    return Sample(
        request=seed if request is None else request,
        tenant="tenant",
        num_prompt_tokens=num_prompt,
        temperature=temperature,
        tokens_T=torch.randint(config.vocab_size, (num_tokens,), generator=generator),
        aux_TA=torch.randn(num_tokens, aux_dim, generator=generator) * has_aux_T[:, None],
        has_aux_T=has_aux_T,
        teacher_ids_Tk=top.indices,
        teacher_logits_Tk=top.values,
        teacher_lse_T=logits_TV.logsumexp(-1),
        has_teacher_T=has_aux_T & (torch.arange(num_tokens) >= num_prompt - 1),
        verify=VerifySteps(),
        finish_reason="stop",
        started_s=ended_s,
        ended_s=ended_s,
    )


def write_target(path: Path, seed: int = 0, **changes: Any) -> Path:
    """A target directory with the tensors a fresh draft reads, and one that it must not need."""
    path.mkdir(parents=True, exist_ok=True)
    raw = TARGET_JSON | changes
    (path / "config.json").write_text(json.dumps(raw))
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "model.embed_tokens.weight": torch.randn(raw["vocab_size"], raw["hidden_size"], generator=generator),
        "model.norm.weight": torch.rand(raw["hidden_size"], generator=generator),
        "model.layers.0.mlp.up_proj.weight": torch.randn(24, 16, generator=generator),
    }
    if not raw["tie_word_embeddings"]:
        tensors["lm_head.weight"] = torch.randn(raw["vocab_size"], raw["hidden_size"], generator=generator)
    save_file(tensors, path / "model.safetensors")
    return path


class LoopDraft:
    """The draft one token at a time, with a growing list of keys and values: what a server does.

    Source: sglang 0.5.23, srt/models/llama_eagle3.py, srt/layers/rotary_embedding/base.py.
    """

    def __init__(self, draft: Draft, embed_VD: torch.Tensor):
        self.config = draft.config
        self.w = draft.weights()
        self.embed_VD = embed_VD
        self.seen: dict[tuple[int, int], tuple[list, torch.Tensor, torch.Tensor]] = {}

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean() + self.config.rms_norm_eps).sqrt() * self.w[f"{name}.weight"]

    def rotate(self, head: torch.Tensor, position: int) -> torch.Tensor:
        half = self.config.head_dim // 2
        angle = position * self.config.rope_theta ** (-2 * torch.arange(half) / self.config.head_dim)
        turned = torch.complex(head[:half], head[half:]) * torch.polar(torch.ones(half), angle)
        return torch.cat([turned.real, turned.imag])

    def fuse(self, aux: torch.Tensor) -> torch.Tensor:
        if len(aux) == self.config.hidden_size:
            return aux
        if self.config.norm_before_fc:
            aux = self.norm(aux, "input_norm")
        if self.config.fc_norm:
            chunks = aux.split(self.config.target_hidden_size)
            aux = torch.cat([self.norm(chunk, f"fc_norm.{i}") for i, chunk in enumerate(chunks)])
        return self.w["fc.weight"] @ aux

    def new_cache(self) -> list[list]:
        """An empty list of (keys, values) per layer."""
        return [[] for _ in range(self.config.num_layers)]

    def token(
        self, token: int, hidden: torch.Tensor, position: int, cache: list[list]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append this token to the cache; its logits and the hidden state the next step reads."""
        for i in range(self.config.num_layers):
            name = f"layers.{i}" if i else "midlayer"
            x = self.norm(hidden, f"{name}.hidden_norm")
            if i == 0:
                x = torch.cat([self.norm(self.embed_VD[token], f"{name}.input_layernorm"), x])
            hidden = self.layer(name, x, hidden, position, cache[i])
        normed = self.norm(hidden, "norm")
        return self.w["lm_head.weight"] @ normed, normed if self.config.norm_output else hidden

    def layer(self, layer: str, x: torch.Tensor, hidden: torch.Tensor, position: int, cache: list) -> torch.Tensor:
        config, attn = self.config, f"{layer}.self_attn."
        q, k, v = ((self.w[f"{attn}{name}_proj.weight"] @ x).split(config.head_dim) for name in ("q", "k", "v"))
        cache.append(([self.rotate(head, position) for head in k], list(v)))
        outs = []
        for i, head in enumerate(q):
            head, j = self.rotate(head, position), i // (config.num_heads // config.num_kv_heads)
            scores = torch.stack([head @ keys[j] for keys, _ in cache]) / config.head_dim**0.5
            outs.append(sum(p * values[j] for p, (_, values) in zip(scores.softmax(0), cache, strict=True)))
        hidden = hidden + self.w[f"{attn}o_proj.weight"] @ torch.cat(outs)
        x = self.norm(hidden, f"{layer}.post_attention_layernorm")
        gate = torch.nn.functional.silu(self.w[f"{layer}.mlp.gate_proj.weight"] @ x)
        return hidden + self.w[f"{layer}.mlp.down_proj.weight"] @ (gate * (self.w[f"{layer}.mlp.up_proj.weight"] @ x))

    def prefix(self, sample: Sample, end: int) -> tuple[list[list], torch.Tensor, torch.Tensor]:
        """Cache of the rows [0, end) that were captured, and the outcome of the last."""
        if (sample.request, end) not in self.seen:
            nothing = self.new_cache(), torch.empty(0), torch.empty(0)
            cache, logits, hidden = self.prefix(sample, end - 1) if end else nothing
            if end and bool(sample.has_aux_T[end - 1]):
                token, aux = int(sample.tokens_T[end]), self.fuse(sample.aux_TA[end - 1])
                logits, hidden = self.token(token, aux, end - 1, cache)
            self.seen[sample.request, end] = (cache, logits, hidden)
        cache, logits, hidden = self.seen[sample.request, end]
        return [list(rows) for rows in cache], logits, hidden

    def target_id(self, logits: torch.Tensor) -> int:
        best = int(logits.argmax())
        return best + int(self.w["d2t"][best]) if "d2t" in self.w else best
