"""Number formats of weight files: bytes <-> float32, and DeepSeek's block-scaled FP8.

Nothing here knows of files; all functions are pure.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from xdeepserve.ops import F32
from xdeepserve.ops.quant import from_bf16, to_bf16

U8 = npt.NDArray[np.uint8]

ITEM_BYTES: Final = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element of every safetensors dtype we know by size."""

FLOAT_DTYPES: Final = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""The dtypes `to_float32` reads."""


def to_float32(raw: U8, dtype: str) -> F32:
    """Decode little-endian elements of `dtype` (one of FLOAT_DTYPES) to float32 [n]. Copies."""
    if dtype == "F32":
        return np.frombuffer(raw.tobytes(), dtype="<f4").astype(np.float32)
    if dtype == "F16":
        return np.frombuffer(raw.tobytes(), dtype="<f2").astype(np.float32)
    if dtype == "BF16":
        return from_bf16(np.frombuffer(raw.tobytes(), dtype="<u2"))
    return _fp8_table(dtype)[raw]


def from_float32(values: F32, dtype: str) -> U8:
    """Encode float32 as "F32", "F16" or "BF16" (nearest even) little-endian bytes [nbytes]."""
    if dtype == "F32":
        encoded = np.ascontiguousarray(values, dtype="<f4")
    elif dtype == "F16":
        encoded = np.ascontiguousarray(values.astype("<f2"))
    elif dtype == "BF16":
        encoded = np.ascontiguousarray(to_bf16(values), dtype="<u2")
    else:
        raise ValueError(f"cannot write dtype {dtype}; use F32, F16 or BF16")
    return encoded.reshape(-1).view(np.uint8)


def scale_blocks(values: F32, scales: F32, block: tuple[int, int]) -> F32:
    """Multiply each `block` of `values` [N, K] by its scale; scales is [ceil(N/bn), ceil(K/bk)].

    Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3.2: 128 x 128 weight blocks.
    """
    rows, columns = values.shape
    per_row = np.repeat(scales, block[0], axis=0)[:rows]
    return values * np.repeat(per_row, block[1], axis=1)[:, :columns]


@cache
def _fp8_table(dtype: str) -> F32:
    """The 256 values of an FP8 format. E4M3 (the "FN" form) has no infinities, NaN at 0x7f."""
    exponent_bits, mantissa_bits = (4, 3) if dtype == "F8_E4M3" else (5, 2)
    bias = 2 ** (exponent_bits - 1) - 1
    table = np.array([_fp8_value(code, mantissa_bits, bias) for code in range(128)], np.float32)
    if dtype == "F8_E4M3":
        table[0x7F] = np.nan
    else:
        table[0x7C], table[0x7D:] = np.inf, np.nan
    both_signs = np.concatenate([table, -table])
    both_signs.flags.writeable = False
    return both_signs


def _fp8_value(code: int, mantissa_bits: int, bias: int) -> float:
    exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits)
    if exponent == 0:
        return float(fraction * 2.0 ** (1 - bias))
    return float((1 + fraction) * 2.0 ** (exponent - bias))
