"""Rows in one byte a value: what is lost is bounded, and the scale loses nothing on top."""

import math

import pytest
import torch

from onlinespec.plugin.float8 import pack_rows


def test_a_value_is_within_a_sixteenth_and_small_ones_within_a_step_of_the_rows_largest():
    aux_NA = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 40)[:, None]
    aux_NA[:, 0] *= 300

    packed_NA, scale_N = pack_rows(aux_NA)

    decoded_NA = packed_NA.float() * scale_N[:, None]
    for wanted, found in zip(aux_NA.tolist(), decoded_NA.tolist(), strict=True):
        largest = max(map(abs, wanted))
        assert all(abs(f - w) <= max(abs(w) / 16, largest * 2**-17) for w, f in zip(wanted, found, strict=True))


def test_scales_are_powers_of_two_so_that_decoding_is_exact_in_bfloat16():
    packed_NA, scale_N = pack_rows(torch.randn(40, 32, generator=torch.Generator().manual_seed(1)).exp())

    assert all(math.frexp(scale)[0] == 0.5 for scale in scale_N.tolist())
    in_bfloat16 = packed_NA.bfloat16() * scale_N.bfloat16()[:, None]
    assert torch.equal(in_bfloat16.float(), packed_NA.float() * scale_N[:, None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_rows_makes_no_difference(dtype: torch.dtype):
    aux_NA = torch.randn(20, 32, generator=torch.Generator().manual_seed(2)) * torch.logspace(-6, 3, 20)[:, None]
    aux_NA = aux_NA.to(dtype)

    packed, wanted = pack_rows(aux_NA), pack_rows(aux_NA.float())

    assert all(torch.equal(a.float(), b.float()) for a, b in zip(packed, wanted, strict=True))


def test_a_row_of_zeros_stays_one():
    packed_NA, scale_N = pack_rows(torch.zeros(2, 8))

    assert not bool((packed_NA.float() * scale_N[:, None]).any())
    assert bool(scale_N.isfinite().all())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_row_that_is_not_finite_stays_so_and_spoils_no_other(value: float):
    aux_NA = torch.ones(2, 4)
    aux_NA[1, 2] = value

    packed_NA, scale_N = pack_rows(aux_NA)

    decoded_NA = packed_NA.float() * scale_N[:, None]
    assert decoded_NA[0].tolist() == [1, 1, 1, 1]
    assert not bool(decoded_NA[1].isfinite().all())
