"""What lets the unmodified SGLang wheel serve on an x86-64 CPU without AMX.

SGLang's CPU path calls C++ kernels of a package named `sgl_kernel`, which is built for AMX only. This room holds the
same kernels in plain torch, under the same names, for text models with full attention in float32; anything beyond that
raises `UnsupportedOnCpuError` with the name of the kernel or the argument. It serves no stream and is inert where a GPU
is present. `settings` imports neither torch nor SGLang.
"""
