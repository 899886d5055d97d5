"""Packed weights of the reference backend: row-major values, no padding between rows.

Bytes of a group: values [N, K] (float32, uint16 bfloat16 bits, int8, or for int4 a byte per
nibble). For int8 weights the float32 scales [N] come first; for int4 bfloat16 scales and then
lows, both [N, ceil(K / 32)]. Each group is padded to a multiple of 64 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xdeepserve.ops.quant import INT4_GROUP, from_bf16, quantize_int4, quantize_int8, to_bf16
from xdeepserve.ops.types import F32, U8, Array, PackedWeight, WeightDtype

LAYOUT = "rows/1"
_ALIGN = 64
_NOTHING: F32 = np.empty(0, np.float32)
_ITEM = {
    WeightDtype.FLOAT32: np.float32,
    WeightDtype.BF16: np.uint16,
    WeightDtype.INT8: np.int8,
    WeightDtype.INT4: np.uint8,
    WeightDtype.W8A16: np.int8,
    WeightDtype.W8A8G64: np.int8,
}


@dataclass(frozen=True, slots=True)
class Weight:
    """One group.

    Attributes:
        values: [N, K] as stored.
        scales: int8 weights: [N]; int4: [N, ceil(K / 32)]; else empty.
        lows: int4: like scales; else empty.
    """

    dtype: WeightDtype
    values: Array
    scales: F32
    lows: F32

    @property
    def num_out(self) -> int:
        return int(self.values.shape[0])

    def dequantized(self) -> F32:
        """[N, K] float32 as the GEMM sees the weight."""
        if self.dtype is WeightDtype.FLOAT32:
            return self.values
        if self.dtype is WeightDtype.BF16:
            return from_bf16(self.values)
        if self.dtype is WeightDtype.INT4:
            per_value = [
                np.repeat(part, INT4_GROUP, axis=1)[:, : self.values.shape[1]]
                for part in (self.scales, self.lows)
            ]
            return self.values.astype(np.float32) * per_value[0] + per_value[1]
        return self.values.astype(np.float32) * self.scales[:, None]


def pack_rows(weight: F32, dtype: WeightDtype) -> PackedWeight:
    """Pack [N, K] or [G, N, K] float32 values."""
    groups = weight[None] if weight.ndim == 2 else weight
    shape = (groups.shape[0], groups.shape[1], groups.shape[2])
    data = np.concatenate([_pack_group(group, dtype) for group in groups])
    return PackedWeight(LAYOUT, dtype, shape, data)


def unpack_rows(weight: PackedWeight) -> list[Weight]:
    """The groups of a weight packed by `pack_rows`, as views.

    Raises:
        ValueError: the weight was packed by another backend.
    """
    if weight.layout != LAYOUT:
        raise ValueError(f"weight has layout {weight.layout!r}; this backend reads {LAYOUT!r}")
    return [_view_group(weight.groups(g, g + 1)) for g in range(weight.shape[0])]


def _pack_group(group: F32, dtype: WeightDtype) -> U8:
    values: Array = np.ascontiguousarray(group, dtype=np.float32)
    head = b""
    if dtype is WeightDtype.BF16:
        values = to_bf16(values)
    elif dtype.has_int8_weights:
        values, scales = quantize_int8(values)
        head = scales.tobytes()
    elif dtype is WeightDtype.INT4:
        values, scale_bits, low_bits = quantize_int4(values)
        head = scale_bits.tobytes() + low_bits.tobytes()
    raw = head + values.tobytes()
    return np.frombuffer(raw + bytes(-len(raw) % _ALIGN), dtype=np.uint8)


def _view_group(weight: PackedWeight) -> Weight:
    _, n, k = weight.shape
    num_groups = -(-k // INT4_GROUP)
    head = 4 * n if weight.dtype.has_int8_weights else 0
    if weight.dtype is WeightDtype.INT4:
        head = 4 * n * num_groups
    item = _ITEM[weight.dtype]
    size = n * k * np.dtype(item).itemsize
    values = weight.data[head : head + size].view(item).reshape(n, k)
    if weight.dtype is WeightDtype.INT4:
        bits = weight.data[:head].view(np.uint16).reshape(2, n, num_groups)
        return Weight(weight.dtype, values, *from_bf16(bits))
    return Weight(weight.dtype, values, weight.data[:head].view(np.float32), _NOTHING)
