"""Norm, rotation, cache writes and attention of the reference backend.

Each query row gathers its own context and takes one softmax over it: nothing is tiled.
"""

from __future__ import annotations

import numpy as np

from xdeepserve.ops.quant import from_bf16, quantize_int8, to_bf16
from xdeepserve.ops.types import F32, I32, Array, AttentionBatch, KVLayer, QKNorm


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    mean = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32)
    scale: F32 = np.reciprocal(np.sqrt(mean + np.float32(eps)))
    return x * scale * weight


def rotate(x: F32, rope: F32, positions: I32) -> F32:
    """[T, h, D] with the first rotary_dim entries of each head rotated in halves."""
    half = rope.shape[1] // 2
    if positions.size and not 0 <= positions.min() <= positions.max() < rope.shape[0]:
        raise ValueError(f"positions must lie in [0, {rope.shape[0]})")
    cos, sin = rope[positions, None, :half], rope[positions, None, half:]
    first, second = x[..., :half], x[..., half : 2 * half]
    out = x.copy()
    out[..., :half] = first * cos - second * sin
    out[..., half : 2 * half] = second * cos + first * sin
    return out


def write_rows(cache: Array, slots: I32, rows: F32, scales: F32 | None = None) -> None:
    """Write rows [T, h, D] into cache [blocks, h, block_size, D] at `slots` [T].

    scales: [blocks, h, block_size] of an int8 cache.
    """
    num_blocks, _, block_size, _ = cache.shape
    if slots.size and not 0 <= slots.min() <= slots.max() < num_blocks * block_size:
        raise ValueError(f"slots must lie in [0, {num_blocks * block_size})")
    blocks, in_block = slots // block_size, slots % block_size
    if scales is not None:
        cache[blocks, :, in_block, :], scales[blocks, :, in_block] = quantize_int8(rows)
        return
    cache[blocks, :, in_block, :] = to_bf16(rows) if cache.dtype == np.uint16 else rows


def rope_kv_write(
    qkv: F32,
    rope: F32,
    batch: AttentionBatch,
    kv: KVLayer,
    *,
    num_heads: int,
    norm: QKNorm | None,
) -> F32:
    """See `Ops.rope_kv_write`."""
    if kv.v is None:
        raise ValueError("rope_kv_write needs a value cache; use mla_kv_write for latent caches")
    num_kv_heads, dim = kv.v.shape[1], kv.v.shape[3]
    heads = qkv.reshape(qkv.shape[0], num_heads + 2 * num_kv_heads, dim)
    q, k, v = np.split(heads, [num_heads, num_heads + num_kv_heads], axis=1)
    if norm is not None:
        q, k = rms_norm(q, norm.q_weight, norm.eps), rms_norm(k, norm.k_weight, norm.eps)
    of_keys, of_values = _scales(kv)
    keys = rotate(k, rope, batch.positions)
    write_rows(kv.k.swapaxes(2, 3), batch.slot_mapping, keys, of_keys)
    write_rows(kv.v, batch.slot_mapping, v, of_values)
    return rotate(q, rope, batch.positions)


def paged_attention(q: F32, batch: AttentionBatch, kv: KVLayer, *, scale: float) -> F32:
    """See `Ops.paged_attention`."""
    if kv.v is None:
        raise ValueError("paged_attention needs a value cache; use mla_attention")
    out = np.empty_like(q)
    group = q.shape[1] // kv.k.shape[1]
    of_keys, of_values = _scales(kv)
    for b in range(batch.seq_lens.size):
        keys = _context(kv.k.swapaxes(2, 3), batch, b, of_keys)
        values = _context(kv.v, batch, b, of_values)
        for t, length in _rows(batch, b):
            for h in range(q.shape[1]):
                head = h // group
                out[t, h] = _attend(q[t, h], keys[head, :length], values[head, :length], scale)
    return out


def mla_attention(
    q_latent: F32, q_rope: F32, batch: AttentionBatch, kv: KVLayer, *, scale: float
) -> F32:
    """See `Ops.mla_attention`."""
    rank = q_latent.shape[2]
    q = np.concatenate([q_latent, q_rope], axis=2)
    out = np.empty_like(q_latent)
    for b in range(batch.seq_lens.size):
        (keys,) = _context(kv.k, batch, b)
        values = np.ascontiguousarray(keys[:, :rank])
        for t, length in _rows(batch, b):
            for h in range(q.shape[1]):
                out[t, h] = _attend(q[t, h], keys[:length], values[:length], scale)
    return out


def _attend(q: F32, keys: F32, values: F32, scale: float) -> F32:
    scores = (keys @ q) * np.float32(scale)
    weights = np.exp(scores - scores.max())
    out: F32 = (weights @ values) / weights.sum()
    return out


def _rows(batch: AttentionBatch, b: int) -> list[tuple[int, int]]:
    """(row of q, number of positions it sees) of sequence b's tokens."""
    start, stop = int(batch.query_start[b]), int(batch.query_start[b + 1])
    first = int(batch.seq_lens[b]) - (stop - start)
    return [(t, first + t - start + 1) for t in range(start, stop)]


def _scales(kv: KVLayer) -> tuple[F32 | None, F32 | None]:
    """Of keys and of values, [blocks, h, block_size] each."""
    if kv.scales is None:
        return None, None
    return kv.scales[:, :, 0], kv.scales[:, :, 1]


def _context(cache: Array, batch: AttentionBatch, b: int, scales: F32 | None = None) -> F32:
    """[h, seq_len, D] float32 rows of sequence b in order of position."""
    num_blocks, _, block_size, _ = cache.shape
    length = int(batch.seq_lens[b])
    blocks = batch.block_tables[b, : -(-length // block_size)]
    if blocks.size * block_size < length:
        raise ValueError(f"sequence {b} has {length} positions but only {blocks.size} blocks")
    if blocks.size and not 0 <= blocks.min() <= blocks.max() < num_blocks:
        raise ValueError(f"block ids of sequence {b} must lie in [0, {num_blocks})")
    positions = np.arange(length)
    rows = cache[blocks[positions // block_size], :, positions % block_size, :].swapaxes(0, 1)
    rows = np.ascontiguousarray(rows)
    if scales is not None:
        factors = scales[blocks[positions // block_size], :, positions % block_size]
        return rows * factors.swapaxes(0, 1)[..., None]
    return from_bf16(rows) if cache.dtype == np.uint16 else rows
