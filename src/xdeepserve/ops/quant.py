"""Number formats of the operators in NumPy: bfloat16 bits and symmetric int8 rows.

These are the definitions; the native core reproduces both bit for bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from xdeepserve.ops.types import F32, I8

U16 = npt.NDArray[np.uint16]

# Rows whose largest magnitude is below this count as zero: 127 / max would overflow.
TINY_ROW = np.float32(2.0**-100)
INT8_MAX = np.float32(127.0)


def to_bf16(values: F32) -> U16:
    """Bfloat16 bits of `values`, rounded to nearest even; NaN stays NaN. Any shape."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, quiet_nan, rounded).astype(np.uint16)


def from_bf16(bits: U16) -> F32:
    """Float32 values of bfloat16 `bits`; exact. Any shape."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_bf16(values: F32) -> F32:
    """`values` rounded to the nearest bfloat16, as float32."""
    return from_bf16(to_bf16(values))


def quantize_int8(rows: F32) -> tuple[I8, F32]:
    """Symmetric int8 of each row [..., K]: values in [-127, 127], scales [...] = max / 127.

    A row whose largest magnitude is below 2**-100 becomes zeros with scale 0.
    """
    if rows.shape[-1] == 0:
        return np.zeros(rows.shape, np.int8), np.zeros(rows.shape[:-1], np.float32)
    largest = np.abs(rows).max(axis=-1)
    is_zero = largest < TINY_ROW
    inverse = np.where(is_zero, np.float32(0), INT8_MAX / np.where(is_zero, INT8_MAX, largest))
    scales = np.where(is_zero, np.float32(0), largest / INT8_MAX)
    scaled = np.rint(rows * inverse[..., None])
    return np.clip(scaled, -INT8_MAX, INT8_MAX).astype(np.int8), scales.astype(np.float32)
