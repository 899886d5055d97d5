"""Number formats of the operators in NumPy: bfloat16 bits, symmetric int8 rows, int4 groups.

These are the definitions; the native core reproduces both bit for bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from xdeepserve.ops.types import F32, I8, U8

U16 = npt.NDArray[np.uint16]

# Rows whose largest magnitude is below this count as zero: 127 / max would overflow.
TINY_ROW = np.float32(2.0**-100)
INT8_MAX = np.float32(127.0)
INT4_MAX = np.float32(15.0)
SPLIT_MAX = np.float32(128 * 127 + 63)

INT4_GROUP = 32
"""Neighbours in k that share a scale and a low."""

INT8_GROUP = 64
"""Activations that share a scale under w8a8g64."""


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


def split_int15(rows: F32) -> tuple[I8, I8, F32]:
    """15 bits of each row [..., K] as 128 * coarse + fine, both in [-127, 127].

    Returns:
        coarse, fine [..., K], and the scales [...] of the coarse values, 128 * max / 16319; of rows
        whose largest magnitude is below 2**-100 all are zero.
    """
    largest = np.abs(rows).max(axis=-1, initial=0)
    is_zero = largest < TINY_ROW
    inverse = np.where(is_zero, np.float32(0), SPLIT_MAX / np.where(is_zero, SPLIT_MAX, largest))
    values = np.clip(np.rint(rows * inverse[..., None]), -SPLIT_MAX, SPLIT_MAX)
    coarse = np.rint(values / np.float32(128))
    fine = values - np.float32(128) * coarse
    scales = np.where(is_zero, np.float32(0), largest / SPLIT_MAX * np.float32(128))
    return coarse.astype(np.int8), fine.astype(np.int8), scales.astype(np.float32)


def split_groups(rows: F32, size: int = INT4_GROUP) -> F32:
    """[..., ceil(K / size), size] of rows [..., K], padded with zeros."""
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % size)]
    return np.pad(rows, padding).reshape(*rows.shape[:-1], -1, size)


def quantize_int4(rows: F32) -> tuple[U8, U16, U16]:
    """4-bit groups of 32 of each row [..., K]: value = scale * nibble + low.

    The smallest value of a group becomes nibble 0 and the largest 15, so a group that holds at most
    16 evenly spaced values, as GGUF's Q4_1 does, keeps them up to the rounding of scale and low.

    Returns:
        nibbles [..., K] in [0, 15], bfloat16 bits of the scales and of the lows
        [..., ceil(K / 32)].
    """
    count = rows.shape[-1]
    edge = [(0, 0)] * (rows.ndim - 1) + [(0, -count % INT4_GROUP)]
    groups = np.pad(rows, edge, mode="edge").reshape(*rows.shape[:-1], -1, INT4_GROUP)
    smallest, largest = groups.min(axis=-1), groups.max(axis=-1)
    scale_bits, low_bits = to_bf16((largest - smallest) / INT4_MAX), to_bf16(smallest)
    scales, lows = from_bf16(scale_bits), from_bf16(low_bits)
    is_flat = scales < TINY_ROW
    inverse = np.where(is_flat, np.float32(0), np.float32(1) / np.where(is_flat, 1, scales))
    nibbles = np.rint((groups - lows[..., None]) * inverse.astype(np.float32)[..., None])
    flat = np.clip(nibbles, 0, INT4_MAX).astype(np.uint8).reshape(*rows.shape[:-1], -1)
    return flat[..., :count], scale_bits, low_bits
