"""The common EAGLE-3 training recipe, written plainly: what the trainer is measured against.

Requests padded to the longest, every position of every request unrolled, attention of each step over the whole
padded sequence with a materialised mask and one more column for each earlier step, logits over the whole
vocabulary for every position and step alive until the backward pass, AdamW. A batch's loss and gradients are
those of our trainer (`bench_trainer_step.py` checks it first). All is computed where the embedding table lies.

B requests, T padded length, A captured layers, D model dim, H query heads, J key heads, d head dim, W vocabulary.
"""

import torch
import torch.nn.functional as F

from onlinespec.draft.model import Draft
from onlinespec.draft.place import is_half


def collate(samples, embed_VD, num_steps):
    """Pad to the longest; positions past the end of a request are masked out."""
    length = max(sample.num_tokens for sample in samples)
    num_words, k = embed_VD.shape[0], samples[0].teacher_ids_Tk.shape[1]
    device = embed_VD.device
    tokens_BT = torch.zeros(len(samples), length + num_steps + 1, dtype=torch.int64, device=device)
    aux_BTA = torch.zeros(len(samples), length, samples[0].aux_TA.shape[1], device=device)
    teacher_BTW = torch.zeros(len(samples), length + num_steps, num_words, device=device)
    mask_BT = torch.zeros(len(samples), length + num_steps, dtype=torch.bool, device=device)
    for i, sample in enumerate(samples):
        n = sample.num_tokens
        tokens_BT[i, :n] = sample.tokens_T
        aux_BTA[i, :n] = sample.aux_TA
        probs_Tk = sample.teacher_logits_Tk.to(device).softmax(-1)
        position_Tk = torch.arange(n, device=device)[:, None].expand(n, k)
        teacher_BTW[i, position_Tk, sample.teacher_ids_Tk.to(device)] = probs_Tk
        mask_BT[i, :n] = sample.has_teacher_T
        mask_BT[i, : sample.num_prompt_tokens] = False
    return tokens_BT, aux_BTA, teacher_BTW, mask_BT


def rotate(x_BTHd, positions_T, inverse_frequency):
    angle = positions_T[:, None].float() * inverse_frequency
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x_BTHd.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def loss_of(draft: Draft, samples, embed_VD, num_steps, decay):
    """Decayed mean KL over rows of each step. `draft` lends its parameters and norms only."""
    config, layer = draft.config, draft.midlayer
    attn = layer.self_attn
    tokens_BT, aux_BTA, teacher_BTW, mask_BT = collate(samples, embed_VD, num_steps)
    length = aux_BTA.shape[1]
    hidden = draft.fuse_aux(aux_BTA)
    device = embed_VD.device
    future_TT = torch.full((length, length), -torch.inf, device=device).triu(1)
    group = config.num_heads // config.num_kv_heads
    keys, values, losses = [], [], []
    for step in range(num_steps):
        embed = embed_VD[tokens_BT[:, 1 + step : 1 + step + length]]
        x = torch.cat([layer.input_layernorm(embed), layer.hidden_norm(hidden)], dim=-1)
        positions_T = torch.arange(length, device=device) + step

        def heads(y):
            return y.unflatten(-1, (-1, config.head_dim))

        query = rotate(heads(attn.q_proj(x)), positions_T, draft.inverse_frequency)
        key = rotate(heads(attn.k_proj(x)), positions_T, draft.inverse_frequency)
        keys.append(key.repeat_interleave(group, 2))
        values.append(heads(attn.v_proj(x)).repeat_interleave(group, 2))
        scale = config.head_dim**-0.5
        scores = torch.einsum("bqhd,bkhd->bhqk", query, keys[0]) * scale + future_TT
        own = [torch.einsum("bqhd,bqhd->bhq", query, k)[..., None] * scale for k in keys[1:]]
        probs = torch.cat([scores, *own], dim=-1).softmax(-1)
        out = torch.einsum("bhqk,bkhd->bqhd", probs[..., :length], values[0])
        for i, value in enumerate(values[1:]):
            out = out + probs[..., length + i].transpose(1, 2)[..., None] * value
        hidden = attn.o_proj(out.flatten(2)) + hidden
        hidden = layer.mlp(layer.post_attention_layernorm(hidden)) + hidden
        logits = draft.lm_head(draft.norm(hidden))
        # Row p of step k learns what the target said at p + 1 + k.
        teacher = teacher_BTW[:, 1 + step : 1 + step + length]
        mask = mask_BT[:, 1 + step : 1 + step + length]
        is_answer = torch.zeros_like(mask)
        for i, sample in enumerate(samples):
            is_answer[i, sample.num_prompt_tokens - 1 : sample.num_tokens - 1] = True
        mask = mask & is_answer
        divergence = F.kl_div(logits.log_softmax(-1), teacher, reduction="none").sum(-1)
        losses.append((divergence * mask).sum() / mask.sum().clamp_min(1))
    weights = [decay**step for step in range(num_steps)]
    return sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)


class PlainTrainer:
    """AdamW on everything; bfloat16 is autocast's, as the trainer's, and in the same cases."""

    def __init__(self, config, draft: Draft, embed_VD):
        self.draft, self.embed_VD, self.config = draft, embed_VD, config
        self.optimizer = torch.optim.AdamW(draft.parameters(), lr=config.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, samples) -> float:
        self.optimizer.zero_grad()
        with torch.autocast(
            self.embed_VD.device.type, torch.bfloat16, enabled=is_half(self.config.dtype, self.config.device)
        ):
            loss = loss_of(self.draft, samples, self.embed_VD, self.config.unroll_steps, self.config.loss_decay)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.draft.parameters(), self.config.clip_norm)
        self.optimizer.step()
        return float(loss.detach())
