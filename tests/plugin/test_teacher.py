"""Top-k and logsumexp of the target's logits, against a loop; the kernel in triton's interpreter."""

import math
import os
import subprocess
import sys

import pytest
import torch

from onlinespec.plugin.teacher import plain, teacher_of

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from onlinespec.plugin.teacher import _top_k_of_chunks
pointers = dict(logits_ptr="*fp32", values_ptr="*fp32", ids_ptr="*i32", lse_ptr="*fp32")
numbers = dict.fromkeys(("row_stride", "num_tokens", "span", "width"), "i32")
compiled = dict.fromkeys(("HAS_LENS", "K", "CHUNK"), "constexpr")
for has_lens, lens in ((True, "*i32"), (False, "constexpr")):
    constants = dict(HAS_LENS=has_lens, K=16, CHUNK=4096, **({} if has_lens else {"accept_lens_ptr": None}))
    signature = {**pointers, "accept_lens_ptr": lens, **numbers, **compiled}
    made = compile(ASTSource(_top_k_of_chunks, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert made.asm["cubin"]
"""

KERNEL = """
import torch
from onlinespec.plugin import teacher
torch.manual_seed(0)
cases = [(3, 9001, 16, torch.float32), (2, 12288, 5, torch.bfloat16)]
for rows, tokens, k, dtype in cases:
    logits = torch.randn(rows, tokens, dtype=torch.float32).to(dtype)
    logits[0, :] = float("-inf")
    logits[0, [7, tokens - 1]] = torch.tensor([1.0, 2.0]).to(dtype)
    found, wanted = teacher.fused(logits, k), teacher.plain(logits, k)
    assert torch.equal(found.logits_Mk, wanted.logits_Mk), (found.logits_Mk, wanted.logits_Mk)
    assert torch.allclose(found.lse_M, wanted.lse_M, atol=1e-5)
    assert found.ids_Mk.dtype == torch.int32
    assert torch.equal(logits.float().gather(1, found.ids_Mk.long()), found.logits_Mk)
    assert all(len(set(ids)) == k and max(ids) < tokens for ids in found.ids_Mk.tolist())
logits, lens = torch.randn(6, 9001), torch.tensor([1, 3], dtype=torch.int32)
logits[[1, 2]] = float("nan")
torch.empty = torch.zeros
found, wanted = teacher.fused(logits, 4, lens), teacher.plain(logits, 4)
kept, rejected = [0, 3, 4, 5], [1, 2]
assert torch.equal(found.logits_Mk[kept], wanted.logits_Mk[kept])
assert torch.equal(logits.gather(1, found.ids_Mk.long())[kept], found.logits_Mk[kept])
assert torch.allclose(found.lse_M[kept], wanted.lse_M[kept], atol=1e-5)
assert not found.logits_Mk[rejected].any() and not found.ids_Mk[rejected].any(), "rejected rows were read"
strided = torch.randn(4, 9000)[::2]
assert torch.equal(teacher.fused(strided, 4).logits_Mk, teacher.plain(strided, 4).logits_Mk)
assert teacher.fused(torch.full((1, 9000), float("-inf")), 4).lse_M.item() == float("-inf")
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_is_the_k_largest_logits_with_their_ids_and_the_logsumexp_of_all(dtype: torch.dtype):
    logits_MV = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = logits_MV.clone()

    teacher = teacher_of(logits_MV, 4)

    for row, logits in enumerate(logits_MV.float().tolist()):
        order = sorted(range(50), key=lambda token: -logits[token])[:4]
        assert [logits[token] for token in order] == teacher.logits_Mk[row].tolist()
        assert [logits[token] for token in teacher.ids_Mk[row].tolist()] == teacher.logits_Mk[row].tolist()
        assert teacher.lse_M[row].item() == pytest.approx(math.log(sum(map(math.exp, logits))), abs=1e-5)
    assert torch.equal(logits_MV, before)
    assert (teacher.ids_Mk.dtype, teacher.logits_Mk.dtype) == (torch.int32, torch.float32)


def test_more_tokens_than_there_are_cannot_be_asked_for():
    assert plain(torch.zeros(1, 3), 16).ids_Mk.shape == (1, 3)


def test_the_kernel_says_the_same_in_tritons_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}

    done = subprocess.run([sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_the_kernel_compiles_for_a_gpu_that_is_not_here(tmp_path):
    """The interpreter runs what the compiler refuses; this is the compiler, to machine code of sm_90."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}

    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU: the compiled kernel")
def test_the_kernel_says_the_same_on_a_gpu():
    logits_MV = torch.randn(64, 128256, device="cuda", generator=torch.Generator("cuda").manual_seed(2))

    lens_B = torch.full((16,), 4, dtype=torch.int32, device="cuda")

    for lens in (None, lens_B):
        found, wanted = teacher_of(logits_MV, 16, lens), plain(logits_MV, 16)
        assert torch.equal(found.logits_Mk, wanted.logits_Mk)
        assert torch.equal(logits_MV.gather(1, found.ids_Mk.long()), found.logits_Mk)
        assert torch.allclose(found.lse_M, wanted.lse_M, atol=1e-4)
