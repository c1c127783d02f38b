"""Tensor <-> header + raw bytes, without a copy on either side.

bfloat16 and float8_e4m3fn have no numpy name, so they travel as uint16 and uint8 bit patterns under their own.
"""

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from onlinespec.errors import WireError

_NUMPY = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "float8_e4m3fn": np.uint8,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "bool": np.bool_,
}
_MAX_DIMS = 4
_MAX_ELEMENTS = 2**40


class FrameHeader(msgspec.Struct, array_like=True, frozen=True):
    """Shape and dtype name of one raw frame, C order, little endian."""

    dtype: str
    shape: list[int]


def header_of(array: np.ndarray, dtype: str | None = None) -> FrameHeader:
    """Header of an array; `dtype` overrides the name where the bits mean something else (bfloat16, float8)."""
    return FrameHeader(dtype or array.dtype.name, list(array.shape))


def array_of(header: FrameHeader, data: bytes | memoryview) -> np.ndarray:
    """Read-only view of a frame as an array of the header's shape; bfloat16 comes as uint16, float8 as uint8.

    Raises: WireError where the dtype is unknown or the byte count is not the shape's.
    """
    dtype = _NUMPY.get(header.dtype)
    if dtype is None:
        raise WireError(f"frame dtype {header.dtype!r} is unknown, wanted one of {', '.join(_NUMPY)}")
    shape = header.shape
    if len(shape) > _MAX_DIMS or min(shape, default=0) < 0 or math.prod(size or 1 for size in shape) > _MAX_ELEMENTS:
        raise WireError(f"frame shape {shape} is no shape: wanted up to {_MAX_DIMS} sizes, none negative or absurd")
    view = memoryview(data).cast("B")
    wanted = math.prod(header.shape) * np.dtype(dtype).itemsize
    if view.nbytes != wanted:
        raise WireError(f"frame {header.dtype}{header.shape} has {view.nbytes} bytes, wanted {wanted}")
    return np.frombuffer(view, dtype=dtype).reshape(header.shape)


def arrays_of(headers: Sequence[FrameHeader], frames: Sequence[bytes | memoryview]) -> list[np.ndarray]:
    """Raises: WireError where the number of frames is not that of the headers, or one does not fit."""
    if len(headers) != len(frames):
        raise WireError(f"{len(frames)} frames came with {len(headers)} headers")
    return [array_of(header, frame) for header, frame in zip(headers, frames, strict=True)]
