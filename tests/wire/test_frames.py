"""Arrays as a header and raw bytes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onlinespec.errors import WireError
from onlinespec.wire.frames import FrameHeader, array_of, arrays_of, header_of

QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)
DTYPES = ["float32", "float16", "int32", "int64", "uint8", "bool"]


@QUICK
@given(st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(max_dims=3, min_side=0))))
def test_an_array_survives_the_wire_bit_for_bit(array: np.ndarray):
    header, data = header_of(array), array.tobytes()

    found = array_of(header, memoryview(data))

    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == data


def test_bfloat16_travels_as_its_bit_pattern():
    bits = np.array([[0x3F80, 0xC000, 0x7F80]], dtype=np.uint16)
    header = header_of(bits, "bfloat16")

    found = array_of(header, bits.tobytes())

    assert header == FrameHeader("bfloat16", [1, 3])
    assert found.dtype == np.uint16
    assert np.array_equal(found, bits)


def test_a_frame_is_viewed_and_not_copied():
    data = bytearray(8)
    found = array_of(FrameHeader("int32", [2]), memoryview(data))

    data[0] = 7

    assert found.tolist() == [7, 0]


@QUICK
@given(shape=st.lists(st.integers(0, 5), max_size=3), extra=st.integers(-8, 8).filter(bool))
def test_a_frame_with_other_bytes_than_its_shape_wants_is_refused_with_both_counts(shape: list[int], extra: int):
    wanted = 4 * math.prod(shape)
    found = max(0, wanted + extra) or wanted + 1

    with pytest.raises(WireError, match=f"has {found} bytes, wanted {wanted}$"):
        array_of(FrameHeader("float32", shape), bytes(found))


def test_an_unknown_dtype_is_refused_with_those_that_are_known():
    with pytest.raises(WireError, match=r"dtype 'object' is unknown, wanted one of float32, .*bool"):
        array_of(FrameHeader("object", [1]), b"12345678")


@pytest.mark.parametrize("shape", [[-1, -4], [2**62, 4], [0, 2**63], [0, 2**31, 2**31], [1] * 70])
def test_a_shape_that_no_array_can_have_is_refused(shape: list[int]):
    with pytest.raises(WireError, match=r"is no shape"):
        array_of(FrameHeader("float32", shape), b"")


def test_another_number_of_frames_than_headers_is_refused():
    headers = [FrameHeader("uint8", [1]), FrameHeader("uint8", [1])]

    with pytest.raises(WireError, match=r"1 frames came with 2 headers"):
        arrays_of(headers, [b"a"])


def test_frames_are_read_in_the_order_of_their_headers():
    headers = [FrameHeader("uint8", [1]), FrameHeader("uint8", [2])]

    assert [array.tolist() for array in arrays_of(headers, [b"\x01", b"\x02\x03"])] == [[1], [2, 3]]
