"""The EAGLE-3 draft in plain torch: one decoder layer over captured hidden states, unrolled on known tokens.

Row p, step 0 reads fc(aux_p) and embed(x_{p+1}) at position p and predicts x_{p+2}. Step k stands at
position p + k, reads embed(x_{p+1+k}) and the hidden state that step k - 1 left before the final norm, and
attends to the step-0 rows up to p and to its own steps 1..k: what SGLang's chain drafting does with its
KV cache, for every row at once. Tokens are teacher-forced; while all drafted tokens before step k equal
the emitted ones, they *are* what the server would have fed.

The parameters carry the names of the checkpoint. The embedding table is the target's and comes with the rows.

C context rows, N query rows, K draft steps, A captured layers, D model dim, W draft vocabulary, V target
vocabulary; H query heads, J key heads, d head dim; c and n the rows of one sample.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from onlinespec.draft.config import DraftConfig
from onlinespec.draft.rows import Rows


class _Norm(nn.Module):
    """RMSNorm without bias; computed in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)


class _Attention(nn.Module):
    def __init__(self, config: DraftConfig):
        super().__init__()
        q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, q_dim, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, kv_dim, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.hidden_size, bias=False)


class _Mlp(nn.Module):
    def __init__(self, config: DraftConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, config: DraftConfig):
        super().__init__()
        self.input_layernorm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.mlp = _Mlp(config)


class Draft(nn.Module):
    """One draft. `weights` are those of a checkpoint; without them the parameters are torch's random ones.

    target_ids_W: the target's id of each draft id; None where the vocabularies are one.

    Source: sglang 0.5.23, srt/models/llama_eagle3.py.
    """

    inverse_frequency: torch.Tensor

    def __init__(self, config: DraftConfig, weights: dict[str, torch.Tensor] | None = None):
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.num_aux * config.target_hidden_size, config.hidden_size, bias=False)
        self.midlayer = _Layer(config)
        self.norm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        if config.fc_norm:
            norms = [_Norm(config.target_hidden_size, config.rms_norm_eps) for _ in range(config.num_aux)]
            self.fc_norm = nn.ModuleList(norms)
        if config.norm_before_fc:
            self.input_norm = _Norm(config.num_aux * config.target_hidden_size, config.rms_norm_eps)
        self.target_ids_W: torch.Tensor | None = None
        self._map: dict[str, torch.Tensor] = {}
        self.register_buffer("inverse_frequency", _inverse_frequency(config), persistent=False)
        if weights is not None:
            self.load_weights(weights)

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Copy the weights of a checkpoint; names and shapes must be those of `canonical_names`."""
        floats = {name: tensor for name, tensor in weights.items() if name not in ("d2t", "t2d")}
        self.load_state_dict({name: tensor.float() for name, tensor in floats.items()})
        if self.config.is_pruned:
            self._map = {name: weights[name] for name in ("d2t", "t2d") if name in weights}
            self.target_ids_W = weights["d2t"] + torch.arange(self.config.draft_vocab_size)

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of everything a checkpoint holds, on the CPU, float32, the vocabulary map included."""
        state = {name: tensor.detach().cpu().clone() for name, tensor in self.state_dict().items()}
        return state | self._map

    def draft_ids(self) -> torch.Tensor | None:
        """Shapes: [V], the draft's id of each target id, -1 where it has none; None for one vocabulary."""
        if self.target_ids_W is None:
            return None
        ids_V = torch.full((self.config.vocab_size,), -1)
        ids_V[self.target_ids_W] = torch.arange(self.config.draft_vocab_size)
        return ids_V

    def fuse_aux(self, aux_CA: torch.Tensor) -> torch.Tensor:
        """Captured hidden states to the draft's width. Shapes: [C, A*D] to [C, D]."""
        if self.config.norm_before_fc:
            aux_CA = self.input_norm(aux_CA)
        if self.config.fc_norm:
            chunks = aux_CA.chunk(self.config.num_aux, dim=-1)
            aux_CA = torch.cat([norm(chunk) for norm, chunk in zip(self.fc_norm, chunks, strict=True)], dim=-1)
        return self.fc(aux_CA)

    def states(self, rows: Rows) -> torch.Tensor:
        """What lm_head reads at every query row and draft step.

        Shapes: [K, N, D], K from the rows.
        """
        config, layer = self.config, self.midlayer
        attn = layer.self_attn
        kv_weight = torch.cat([attn.k_proj.weight, attn.v_proj.weight])
        qkv_weight = torch.cat([attn.q_proj.weight, kv_weight])
        q_dim, kv_dim = attn.q_proj.out_features, attn.k_proj.out_features
        hidden_CD = self.fuse_aux(rows.aux_CA)
        inputs = torch.cat([layer.input_layernorm(rows.embed_CD), layer.hidden_norm(hidden_CD)], dim=-1)
        key_C, value_C = F.linear(inputs, kv_weight).split([kv_dim, kv_dim], dim=-1)
        history = _History(config, rows, self._rotate(key_C, rows.position_C), value_C)
        position_N = rows.position_C[rows.query_N]
        query_N = self._rotate(attn.q_proj(inputs[rows.query_N]), position_N)
        residual = hidden_CD[rows.query_N]
        embed_NKD = layer.input_layernorm(rows.embed_NKD)
        states = []
        for step in range(rows.embed_NKD.shape[1]):
            if step:
                inputs = torch.cat([embed_NKD[:, step], layer.hidden_norm(residual)], dim=-1)
                query, key, value = F.linear(inputs, qkv_weight).split([q_dim, kv_dim, kv_dim], dim=-1)
                query_N = self._rotate(query, position_N + step)
                history.append(self._rotate(key, position_N + step), value)
            hidden = attn.o_proj(history.attend(query_N)) + residual
            hidden = layer.mlp(layer.post_attention_layernorm(hidden)) + hidden
            states.append(self.norm(hidden))
            residual = states[-1] if config.norm_output else hidden
        return torch.stack(states)

    def unroll(self, rows: Rows) -> torch.Tensor:
        """Logits over the draft's vocabulary at every query row and draft step. Shapes: [K, N, W]."""
        return self.lm_head(self.states(rows))

    def _rotate(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """RoPE on halves. Shapes: [N, heads * d] and [N] to [N, heads, d].

        Source: sglang 0.5.23, srt/layers/rotary_embedding/base.py, RotaryEmbedding (NeoX style).
        """
        angle = position[:, None, None].float() * self.inverse_frequency
        cos, sin = angle.cos(), angle.sin()
        first, second = x.unflatten(-1, (-1, self.config.head_dim)).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class _History:
    """Keys and values: those of all context rows, and one per query row for each later step.

    Works sample by sample: no padding and no mask across samples. Query heads are grouped under the key
    head they share.
    """

    def __init__(self, config: DraftConfig, rows: Rows, key_CJd: torch.Tensor, value_C: torch.Tensor):
        self._num_kv_heads, self._head_dim = config.num_kv_heads, config.head_dim
        self._group = config.num_heads // config.num_kv_heads
        self._contexts, self._queries = [c for c, _ in rows.sizes], [n for _, n in rows.sizes]
        self._key = [k.permute(1, 2, 0) for k in key_CJd.split(self._contexts)]
        self._value = [v.transpose(0, 1) for v in self._heads(value_C).split(self._contexts)]
        self._own_key: list[torch.Tensor] = []
        self._own_value: list[torch.Tensor] = []
        self._mask, first = [], 0
        for (num_context, _), query_n in zip(rows.sizes, rows.query_N.split(self._queries), strict=True):
            is_future = torch.arange(num_context, device=query_n.device) > query_n[:, None] - first
            mask = torch.zeros(is_future.shape, device=query_n.device).masked_fill_(is_future, -math.inf)
            self._mask.append(mask.repeat(self._group, 1))
            first += num_context

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self._num_kv_heads, self._head_dim))

    def append(self, key_NJd: torch.Tensor, value_N: torch.Tensor) -> None:
        self._own_key.append(key_NJd)
        self._own_value.append(self._heads(value_N))

    def attend(self, query_NHd: torch.Tensor) -> torch.Tensor:
        """Shapes: [N, H, d] to [N, H * d]."""
        scale = self._head_dim**-0.5
        query_NJGd = query_NHd.unflatten(1, (self._num_kv_heads, self._group))
        own = [torch.einsum("njgd,njd->jgn", query_NJGd, key) * scale for key in self._own_key]
        own_scores = torch.stack(own, dim=-1).split(self._queries, dim=2) if own else None
        context, own_probs = [], []
        for i, query in enumerate(query_NJGd.split(self._queries)):
            num_queries = self._queries[i]
            query = query.permute(1, 2, 0, 3).reshape(self._num_kv_heads, -1, self._head_dim)
            scores = torch.baddbmm(self._mask[i], query, self._key[i], alpha=scale)
            if own_scores is not None:
                scores = torch.cat([scores, own_scores[i].flatten(1, 2)], dim=-1)
            probs = scores.softmax(dim=-1)
            out = torch.bmm(probs[..., : self._contexts[i]], self._value[i])
            context.append(out.unflatten(1, (self._group, num_queries)).permute(2, 0, 1, 3))
            own_probs.append(probs[..., self._contexts[i] :].unflatten(1, (self._group, num_queries)))
        out_NJGd = torch.cat(context)
        if own_scores is not None:
            probs = torch.cat(own_probs, dim=2)
            values = torch.stack(self._own_value)
            out_NJGd = out_NJGd + torch.einsum("jgnk,knjd->njgd", probs, values)
        return out_NJGd.flatten(1)


def _inverse_frequency(config: DraftConfig) -> torch.Tensor:
    """Shapes: [d / 2].

    Source: sglang 0.5.23, srt/layers/rotary_embedding/rope_variant.py, Llama3RotaryEmbedding.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    if config.rope_llama3 is None:
        return frequency
    factor, low, high, original = config.rope_llama3
    wave_length = 2 * math.pi / frequency
    smooth = (original / wave_length - low) / (high - low) if low != high else torch.zeros_like(frequency)
    blended = (1 - smooth) * frequency / factor + smooth * frequency
    blended = torch.where(wave_length > original / low, frequency / factor, blended)
    return torch.where(wave_length < original / high, frequency, blended)
