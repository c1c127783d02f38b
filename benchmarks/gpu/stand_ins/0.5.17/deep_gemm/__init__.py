"""Stands where sgl-deep-gemm would: SGLang imports it on the way to CUDA graphs, and no bfloat16 Llama calls it."""
