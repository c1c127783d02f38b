"""Stands where sgl-flash-mla would: SGLang imports it on the way to CUDA graphs, and no Llama calls it."""

fused_norm_rope_attn_rope_cast = None
