"""The EAGLE-3 draft in plain torch: decoder layers over captured hidden states, unrolled on known tokens.

Row p, step 0 reads fc(aux_p) and embed(x_{p+1}) at position p and predicts x_{p+2}. Step k stands at
position p + k, reads embed(x_{p+1+k}) and the hidden state that step k - 1 left before the final norm, and
attends to the step-0 rows up to p and to its own steps 1..k: what SGLang's chain drafting does with its
KV cache, for every row at once. Tokens are teacher-forced; while all drafted tokens before step k equal
the emitted ones, they *are* what the server would have fed.

The last layer needs of a context row its key and value only; a layer below it is run in full on every
context row, because the layer above takes its keys and values from there.

The parameters carry the names of the checkpoint. The embedding table is the target's and comes with the rows.

C context rows, N query rows, K draft steps, A captured layers, D model dim, W draft vocabulary, V target
vocabulary; H query heads, J key heads, d head dim; c and n the rows of one sample.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from onlinespec.draft.compiled import compiled
from onlinespec.draft.config import DraftConfig
from onlinespec.draft.flex import ContextAttention, merge
from onlinespec.draft.rows import Rows

_Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine of RoPE at N positions, each [N, 1, d / 2]."""
_Own = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""Key and value that each draft step after the first left in one layer, each [N, J, d]."""


class _Norm(nn.Module):
    """RMSNorm without bias; computed in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)


class _Attention(nn.Module):
    """The projections of one layer."""

    def __init__(self, config: DraftConfig, input_dim: int):
        super().__init__()
        q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(input_dim, q_dim, bias=False)
        self.k_proj = nn.Linear(input_dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(input_dim, kv_dim, bias=False)
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
    """One decoder layer. The first reads the token's embedding beside the hidden state, the others do not.

    Source: sglang 0.5.23, srt/models/llama_eagle3.py, LlamaDecoderLayer.
    """

    def __init__(self, config: DraftConfig, is_first: bool):
        super().__init__()
        self.is_first = is_first
        if is_first:
            self.input_layernorm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config, (1 + is_first) * config.hidden_size)
        self.mlp = _Mlp(config)

    def read(self, hidden_ND: torch.Tensor, embed_ND: torch.Tensor) -> torch.Tensor:
        """What the projections read. Shapes: [N, 2 * D] in the first layer, else [N, D]."""
        hidden_ND = self.hidden_norm(hidden_ND)
        return torch.cat([self.input_layernorm(embed_ND), hidden_ND], dim=-1) if self.is_first else hidden_ND

    def write(self, attended: torch.Tensor, hidden_ND: torch.Tensor) -> torch.Tensor:
        """The layer's output from what attention gathered. Shapes: [N, H * d] and [N, D] to [N, D]."""
        hidden_ND = self.self_attn.o_proj(attended) + hidden_ND
        return self.mlp(self.post_attention_layernorm(hidden_ND)) + hidden_ND


class Draft(nn.Module):
    """One draft. `weights` are those of a checkpoint; without them the parameters are torch's random ones.

    target_ids_W: the target's id of each draft id; None where the vocabularies are one.

    Source: sglang 0.5.23, srt/models/llama_eagle3.py.
    """

    inverse_frequency: torch.Tensor

    def __init__(self, config: DraftConfig, weights: dict[str, torch.Tensor] | None = None):
        super().__init__()
        self.config = config
        if config.has_fc:
            self.fc = nn.Linear(config.num_aux * config.target_hidden_size, config.hidden_size, bias=False)
        self.midlayer = _Layer(config, is_first=True)
        self.layers = nn.ModuleDict({str(i): _Layer(config, is_first=False) for i in range(1, config.num_layers)})
        self.norm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        if config.fc_norm:
            norms = [_Norm(config.target_hidden_size, config.rms_norm_eps) for _ in range(config.num_aux)]
            self.fc_norm = nn.ModuleList(norms)
        if config.norm_before_fc:
            self.input_norm = _Norm(config.num_aux * config.target_hidden_size, config.rms_norm_eps)
        self.is_recomputing = False
        """forget what each draft step computed and do it again in the backward pass"""
        self.is_flex = False
        """attend with `ContextAttention`"""
        self.target_ids_W: torch.Tensor | None = None
        self._map: dict[str, torch.Tensor] = {}
        self.register_buffer("inverse_frequency", _inverse_frequency(config), persistent=False)
        if weights is not None:
            self.load_weights(weights)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def compile_layers(self) -> None:
        """torch.compile what every layer does to its rows beside attention, once for all numbers of rows."""
        for layer in (self.midlayer, *self.layers.values()):
            for name in ("read", "write"):
                setattr(layer, name, compiled(getattr(layer, name)))

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
        if not self.config.has_fc:
            return aux_CA
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
        packing = _Packing(self.config, rows, self.is_flex)
        rotation_C = self._rotation(rows.position_C)
        hidden_CD = self.fuse_aux(rows.aux_CA.float())
        passes = [_LayerPass(self.midlayer, packing, hidden_CD, rows.embed_CD, rotation_C)]
        for layer in self.layers.values():
            assert isinstance(layer, _Layer)
            hidden_CD = passes[-1].context(hidden_CD, rotation_C)
            passes.append(_LayerPass(layer, packing, hidden_CD, rows.embed_CD, rotation_C))
        position_N = rows.position_C[rows.query_N]
        hidden_ND = passes[-1].queries(hidden_CD, rows.query_N, self._rotation(position_N))
        states = [self.norm(hidden_ND)]
        own: list[_Own] = [()] * len(passes)
        for step in range(1, rows.embed_NKD.shape[1]):
            hidden_ND = states[-1] if self.config.norm_output else hidden_ND
            rotation_N = self._rotation(position_N + step)
            inputs = (passes, hidden_ND, rows.embed_NKD[:, step], rotation_N, own)
            hidden_ND, own = (
                checkpoint(_draft_step, *inputs, use_reentrant=False) if self.is_recomputing else _draft_step(*inputs)
            )
            states.append(self.norm(hidden_ND))
        return torch.stack(states)

    def unroll(self, rows: Rows) -> torch.Tensor:
        """Logits over the draft's vocabulary at every query row and draft step. Shapes: [K, N, W]."""
        return self.lm_head(self.states(rows))

    def _rotation(self, position_N: torch.Tensor) -> _Rotation:
        angle = position_N[:, None, None].float() * self.inverse_frequency
        return angle.cos(), angle.sin()


def _rotate(x: torch.Tensor, rotation: _Rotation) -> torch.Tensor:
    """RoPE on halves. Shapes: [N, heads, d].

    Source: sglang 0.5.23, srt/layers/rotary_embedding/base.py, RotaryEmbedding (NeoX style).
    """
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _draft_step(
    passes: "list[_LayerPass]", hidden_ND: torch.Tensor, embed_ND: torch.Tensor, rotation: _Rotation, own: list[_Own]
) -> tuple[torch.Tensor, list[_Own]]:
    """One draft step after the first through all layers; `own` grows by what the step leaves in each.

    Changes nothing it is given, so it may be run again in a backward pass.
    """
    grown = []
    for layer_pass, past in zip(passes, own, strict=True):
        hidden_ND, left = layer_pass.step(hidden_ND, embed_ND, rotation, past)
        grown.append(left)
    return hidden_ND, grown


class _Packing:
    """How the rows of all samples lie in one tensor, and what a query row may see of its sample's context.

    Works sample by sample: no padding and no mask across samples. Query heads are grouped under the key
    head they share.
    """

    def __init__(self, config: DraftConfig, rows: Rows, is_flex: bool):
        self.num_kv_heads, self.head_dim = config.num_kv_heads, config.head_dim
        self.group = config.num_heads // config.num_kv_heads
        self.contexts, self.queries = [c for c, _ in rows.sizes], [n for _, n in rows.sizes]
        self.flex = ContextAttention(rows) if is_flex else None
        self.masks: list[torch.Tensor] = []
        if not is_flex:
            self._build_masks(rows)

    def _build_masks(self, rows: Rows) -> None:
        first = 0
        for num_context, query_n in zip(self.contexts, rows.query_N.split(self.queries), strict=True):
            is_future = torch.arange(num_context, device=query_n.device) > query_n[:, None] - first
            mask = torch.zeros(is_future.shape, device=query_n.device).masked_fill_(is_future, -math.inf)
            self.masks.append(mask.repeat(self.group, 1))
            first += num_context

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes: [N, heads * d] to [N, heads, d]."""
        return x.unflatten(-1, (-1, self.head_dim))


class _LayerPass:
    """One layer in one unroll: its keys and values of all context rows, and what is computed from them."""

    def __init__(
        self,
        layer: _Layer,
        packing: _Packing,
        hidden_CD: torch.Tensor,
        embed_CD: torch.Tensor,
        rotation_C: _Rotation,
    ):
        self._layer, self._packing = layer, packing
        attn = layer.self_attn
        self._sizes = [attn.q_proj.out_features, attn.k_proj.out_features, attn.v_proj.out_features]
        kv_weight = torch.cat([attn.k_proj.weight, attn.v_proj.weight])
        self._qkv_weight = torch.cat([attn.q_proj.weight, kv_weight])
        self._inputs = layer.read(hidden_CD, embed_CD)
        key, value = F.linear(self._inputs, kv_weight).split(self._sizes[1:], dim=-1)
        key_CJd = _rotate(packing.heads(key), rotation_C)
        self._key_CJd, self._value_CJd = key_CJd, packing.heads(value)
        self._key = [k.permute(1, 2, 0) for k in key_CJd.split(packing.contexts)]
        self._value = [v.transpose(0, 1) for v in self._value_CJd.split(packing.contexts)]

    def context(self, hidden_CD: torch.Tensor, rotation_C: _Rotation) -> torch.Tensor:
        """Output at every context row. Shapes: [C, D]."""
        query_CHd = _rotate(self._packing.heads(self._layer.self_attn.q_proj(self._inputs)), rotation_C)
        attended = []
        for query, key, value in zip(query_CHd.split(self._packing.contexts), self._key, self._value, strict=True):
            query, key = query.transpose(0, 1), key.transpose(1, 2)
            out = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True, enable_gqa=True)
            attended.append(out[0].transpose(0, 1).flatten(1))
        return self._layer.write(torch.cat(attended), hidden_CD)

    def queries(self, hidden_CD: torch.Tensor, query_N: torch.Tensor, rotation_N: _Rotation) -> torch.Tensor:
        """Output at the query rows in the first draft step. Shapes: [N, D]."""
        query_NHd = _rotate(self._packing.heads(self._layer.self_attn.q_proj(self._inputs[query_N])), rotation_N)
        return self._layer.write(self._attend(query_NHd, ()), hidden_CD[query_N])

    def step(
        self, hidden_ND: torch.Tensor, embed_ND: torch.Tensor, rotation_N: _Rotation, own: _Own
    ) -> tuple[torch.Tensor, _Own]:
        """Output in a later draft step, and `own` with its key and value appended. Shapes: [N, D]."""
        qkv = F.linear(self._layer.read(hidden_ND, embed_ND), self._qkv_weight)
        query, key, value = (self._packing.heads(x) for x in qkv.split(self._sizes, dim=-1))
        own = (*own, (_rotate(key, rotation_N), value))
        return self._layer.write(self._attend(_rotate(query, rotation_N), own), hidden_ND), own

    def _attend(self, query_NHd: torch.Tensor, own: _Own) -> torch.Tensor:
        """To the context rows up to each query row, and to its own later steps. Shapes: [N, H, d] to [N, H * d]."""
        packing, scale = self._packing, self._packing.head_dim**-0.5
        if packing.flex is not None:
            return self._attend_flex(packing.flex, query_NHd, own)
        query_NJGd = query_NHd.unflatten(1, (packing.num_kv_heads, packing.group))
        scores_own = [torch.einsum("njgd,njd->jgn", query_NJGd, key) * scale for key, _ in own]
        own_scores = torch.stack(scores_own, dim=-1).split(packing.queries, dim=2) if own else None
        context, own_probs = [], []
        for i, query in enumerate(query_NJGd.split(packing.queries)):
            num_queries = packing.queries[i]
            query = query.permute(1, 2, 0, 3).reshape(packing.num_kv_heads, -1, packing.head_dim)
            scores = torch.baddbmm(packing.masks[i], query, self._key[i], alpha=scale)
            if own_scores is not None:
                scores = torch.cat([scores, own_scores[i].flatten(1, 2)], dim=-1)
            probs = scores.softmax(dim=-1)
            out = torch.bmm(probs[..., : packing.contexts[i]], self._value[i])
            context.append(out.unflatten(1, (packing.group, num_queries)).permute(2, 0, 1, 3))
            own_probs.append(probs[..., packing.contexts[i] :].unflatten(1, (packing.group, num_queries)))
        out_NJGd = torch.cat(context)
        if own:
            probs = torch.cat(own_probs, dim=2)
            values = torch.stack([value for _, value in own])
            out_NJGd = out_NJGd + torch.einsum("jgnk,knjd->njgd", probs, values)
        return out_NJGd.flatten(1)

    def _attend_flex(self, flex: ContextAttention, query_NHd: torch.Tensor, own: _Own) -> torch.Tensor:
        """The same without masks and probabilities of the context in memory."""
        key_CJd, value_CJd = (x.to(query_NHd.dtype) for x in (self._key_CJd, self._value_CJd))
        out_NHd, lse_NH = flex(query_NHd, key_CJd, value_CJd)
        if own:
            keys, values = (torch.stack(part, dim=2) for part in zip(*own, strict=True))
            query_NJGd = query_NHd.unflatten(1, (self._packing.num_kv_heads, self._packing.group))
            scores = torch.einsum("njgd,njkd->njgk", query_NJGd, keys) * self._packing.head_dim**-0.5
            values_NHkd = values.repeat_interleave(self._packing.group, dim=1)
            out_NHd = merge(out_NHd, lse_NH, scores.flatten(1, 2), values_NHkd)
        return out_NHd.flatten(1)


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
