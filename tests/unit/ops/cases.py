"""Inputs shared by the operator tests: backends by name, random weights, paged caches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xdeepserve import _native, envs
from xdeepserve.ops import F32, I32, Array, AttentionBatch, KVLayer
from xdeepserve.ops.cpu import CpuOps
from xdeepserve.ops.quant import quantize_int8

ISAS = _native.available_isas()


def make_cpu(*, isa: str = "auto", num_threads: int = 1) -> CpuOps:
    with envs.ISA.override(isa):
        return CpuOps(num_threads=num_threads)


def normal(rng: np.random.Generator, *shape: int) -> F32:
    return rng.standard_normal(shape, dtype=np.float32)


@dataclass(frozen=True)
class Paged:
    """A random batch over a paged cache whose unused rows (int8: their scales) hold NaN."""

    batch: AttentionBatch
    kv: KVLayer

    @property
    def num_tokens(self) -> int:
        return int(self.batch.query_start[-1])

    def alone(self, b: int) -> tuple[slice, AttentionBatch]:
        """The rows of sequence b, and a batch with that sequence only."""
        start, stop = self.batch.query_start[b : b + 2]
        rows = slice(int(start), int(stop))
        batch = AttentionBatch(
            query_start=np.array([0, stop - start], np.int32),
            seq_lens=self.batch.seq_lens[b : b + 1],
            block_tables=self.batch.block_tables[b : b + 1],
            positions=self.batch.positions[rows],
            slot_mapping=self.batch.slot_mapping[rows],
        )
        return rows, batch


def make_paged(
    rng: np.random.Generator,
    lengths: list[tuple[int, int]],
    *,
    heads: int,
    dim: int,
    block_size: int = 16,
    dtype: type = np.float32,
    latent: bool = False,
) -> Paged:
    """A cache with shuffled blocks; lengths are (query tokens, context length) per sequence."""
    needed = [-(-length // block_size) for _, length in lengths]
    num_blocks = sum(needed) + 2
    ids = rng.permutation(num_blocks).astype(np.int32)
    tables = np.full((len(lengths), max(needed, default=0) + 1), -1, np.int32)
    positions: list[int] = []
    slots: list[int] = []
    keys = np.full((num_blocks, heads, block_size, dim), np.nan, np.float32)
    values = keys.copy()
    start = 0
    for b, (count, length) in enumerate(lengths):
        tables[b, : needed[b]] = ids[start : start + needed[b]]
        start += needed[b]
        for position in range(length):
            block, row = tables[b, position // block_size], position % block_size
            keys[block, :, row] = normal(rng, heads, dim)
            values[block, :, row] = normal(rng, heads, dim)
        new = range(length - count, length)
        positions += new
        slots += [int(tables[b, p // block_size]) * block_size + p % block_size for p in new]
    starts = np.cumsum([0] + [count for count, _ in lengths])
    batch = AttentionBatch(
        query_start=starts.astype(np.int32),
        seq_lens=np.array([length for _, length in lengths], np.int32),
        block_tables=tables,
        positions=np.array(positions, np.int32),
        slot_mapping=np.array(slots, np.int32),
    )
    if latent:
        return Paged(batch, KVLayer(_stored(keys, dtype), None))
    return Paged(batch, stored_layer(keys, values, dtype))


def stored_layer(keys: F32, values: F32, dtype: type) -> KVLayer:
    """A cache layer of float32 rows [blocks, heads, block_size, D]."""
    if dtype is not np.int8:
        transposed = np.ascontiguousarray(keys.swapaxes(2, 3))
        return KVLayer(_stored(transposed, dtype), _stored(values, dtype))
    (k, key_scales), (v, value_scales) = _stored_int8(keys), _stored_int8(values)
    scales = np.stack([key_scales, value_scales], axis=2)
    return KVLayer(np.ascontiguousarray(k.swapaxes(2, 3)), v, scales)


def _stored_int8(rows: F32) -> tuple[Array, F32]:
    """Quantized rows; those of NaN keep a scale of NaN."""
    quantized, scales = quantize_int8(np.nan_to_num(rows))
    return quantized, np.where(np.isnan(rows).any(axis=-1), np.float32(np.nan), scales)


def _stored(values: F32, dtype: type) -> Array:
    if dtype is np.float32:
        return values
    # A NaN must stay NaN in bfloat16, so truncate: rounding is not what these tests look at.
    return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def rope_table(rng: np.random.Generator, rows: int, rotary_dim: int) -> F32:
    angles = rng.uniform(0, 6.28, (rows, rotary_dim // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def ids(*values: int) -> I32:
    return np.array(values, np.int32)
