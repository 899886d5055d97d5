"""`ReferenceOps`: the contract in plain NumPy, the oracle of every other backend.

Obvious before fast. Rows are computed one at a time, so a result never depends on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xdeepserve.ops import composed
from xdeepserve.ops import reference_attention as attention
from xdeepserve.ops import reference_sampling as sampling
from xdeepserve.ops.quant import (
    INT8_GROUP,
    from_bf16,
    quantize_int8,
    round_bf16,
    split_groups,
    split_int15,
)
from xdeepserve.ops.reference_weights import LAYOUT, Weight, pack_rows, unpack_rows
from xdeepserve.ops.types import (
    F32,
    I8,
    I32,
    Array,
    AttentionBatch,
    AttentionOutput,
    DecoderStack,
    GateSpec,
    GqaLayer,
    KVLayer,
    MlaLayer,
    PackedWeight,
    Penalties,
    QKNorm,
    SamplingBatch,
    WeightDtype,
)


class ReferenceOps:
    """NumPy backend; see `Ops` for what each operator does."""

    name = "reference"
    layout = LAYOUT
    outlier_dtype = WeightDtype.W8A8G64

    def pack(self, weight: F32, *, dtype: WeightDtype) -> PackedWeight:
        return pack_rows(weight, dtype)

    def unpack(self, weight: PackedWeight) -> F32:
        return np.stack([group.dequantized() for group in unpack_rows(weight)])

    def embed(self, table: Array, token_ids: I32) -> F32:
        if token_ids.size and not 0 <= token_ids.min() <= token_ids.max() < table.shape[0]:
            raise ValueError(f"token ids must lie in [0, {table.shape[0]})")
        rows = table[token_ids]
        return from_bf16(rows) if table.dtype == np.uint16 else rows

    def linear(self, x: F32, weight: PackedWeight, bias: F32 | None = None) -> F32:
        (group,) = unpack_rows(weight)
        out = _matmul(x, group)
        return out if bias is None else out + bias

    def grouped_linear(self, x: F32, weight: PackedWeight) -> F32:
        groups = unpack_rows(weight)
        return np.stack([_matmul(x[:, g], group) for g, group in enumerate(groups)], axis=1)

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        return attention.rms_norm(x, weight, eps)

    def add_rms_norm(self, residual: F32, x: F32, weight: F32, eps: float) -> tuple[F32, F32]:
        total = residual + x
        return total, attention.rms_norm(total, weight, eps)

    def swiglu_mlp(
        self, x: F32, gate_up: PackedWeight, down: PackedWeight, out: F32 | None = None
    ) -> F32:
        return self.expert_mlp(x, np.array([x.shape[0]], np.int32), gate_up, down, out)

    def quantize_rows(self, x: F32) -> tuple[I8, F32]:
        return quantize_int8(x)

    def rope_kv_write(
        self,
        qkv: F32,
        rope: F32,
        batch: AttentionBatch,
        kv: KVLayer,
        *,
        num_heads: int,
        norm: QKNorm | None = None,
    ) -> F32:
        return attention.rope_kv_write(qkv, rope, batch, kv, num_heads=num_heads, norm=norm)

    def paged_attention(self, q: F32, batch: AttentionBatch, kv: KVLayer, *, scale: float) -> F32:
        return attention.paged_attention(q, batch, kv, scale=scale)

    def rope(self, x: F32, rope: F32, positions: I32) -> F32:
        return attention.rotate(x, rope, positions)

    def mla_kv_write(self, latent: F32, k_rope: F32, batch: AttentionBatch, kv: KVLayer) -> None:
        rows = np.concatenate([latent, k_rope], axis=1)[:, None, :]
        attention.write_rows(kv.k, batch.slot_mapping, rows)

    def mla_attention(
        self, q_latent: F32, q_rope: F32, batch: AttentionBatch, kv: KVLayer, *, scale: float
    ) -> F32:
        return attention.mla_attention(q_latent, q_rope, batch, kv, scale=scale)

    def gqa_layer(
        self,
        layer: GqaLayer,
        residual: F32,
        ffn_output: F32 | None,
        batch: AttentionBatch,
        kv: KVLayer,
    ) -> AttentionOutput:
        return composed.gqa_layer(self, layer, residual, ffn_output, batch, kv)

    def mla_layer(
        self,
        layer: MlaLayer,
        residual: F32,
        ffn_output: F32 | None,
        batch: AttentionBatch,
        kv: KVLayer,
    ) -> AttentionOutput:
        return composed.mla_layer(self, layer, residual, ffn_output, batch, kv)

    def gate_topk(self, logits: F32, spec: GateSpec, bias: F32 | None = None) -> tuple[I32, F32]:
        ids = np.empty((logits.shape[0], spec.top_k), np.int32)
        weights = np.empty((logits.shape[0], spec.top_k), np.float32)
        for t, row in enumerate(logits):
            ids[t], weights[t] = sampling.route(row, spec, bias)
        return ids, weights

    def expert_mlp(
        self,
        x: F32,
        num_tokens_per_expert: I32,
        gate_up: PackedWeight,
        down: PackedWeight,
        out: F32 | None = None,
    ) -> F32:
        if out is None:
            out = np.empty((x.shape[0], down.shape[1]), np.float32)
        start = 0
        pairs = zip(unpack_rows(gate_up), unpack_rows(down), strict=True)
        for count, (gate_up_group, down_group) in zip(num_tokens_per_expert, pairs, strict=True):
            stop = start + int(count)
            out[start:stop] = _swiglu(x[start:stop], gate_up_group, down_group)
            start = stop
        if start != x.shape[0]:
            raise ValueError(f"num_tokens_per_expert sums to {start}, but x has {x.shape[0]} rows")
        return out

    def combine_topk(self, rows: F32, row_of_slot: I32, topk_weights: F32) -> F32:
        out = np.zeros((row_of_slot.shape[0], rows.shape[1]), np.float32)
        for t, k in np.ndindex(*row_of_slot.shape):
            row = int(row_of_slot[t, k])
            if not -1 <= row < rows.shape[0]:
                raise ValueError(f"row_of_slot must lie in [-1, {rows.shape[0]}), not {row}")
            if row >= 0:
                out[t] += topk_weights[t, k] * rows[row]
        return out

    def routed_experts(
        self, x: F32, topk_ids: I32, topk_weights: F32, gate_up: PackedWeight, down: PackedWeight
    ) -> F32:
        return composed.routed_experts(self, x, topk_ids, topk_weights, gate_up, down)

    def decoder_layers(
        self,
        stack: DecoderStack,
        hidden_states: F32,
        batch: AttentionBatch,
        kv_layers: Sequence[KVLayer],
    ) -> F32:
        return composed.decoder_layers(self, stack, hidden_states, batch, kv_layers)

    def lm_head(self, x: F32, weight: PackedWeight, num_greedy: int) -> tuple[I32, F32]:
        logits = self.linear(x, weight)
        return logits[:num_greedy].argmax(axis=1).astype(np.int32), logits[num_greedy:]

    def penalize(
        self, logits: F32, prompt: I32, output: I32, penalties: Penalties
    ) -> tuple[I32, F32]:
        ids = np.unique(np.concatenate([output, prompt]))
        raw = logits[ids]
        repetition = np.float32(penalties.repetition)
        values = np.where(raw > 0, raw / repetition, raw * repetition)
        counts = (ids[:, None] == output).sum(axis=1).astype(np.float32)
        values -= np.float32(penalties.frequency) * counts
        values -= np.float32(penalties.presence) * (counts > 0)
        logits[ids] = values
        return ids, raw

    def sample(self, logits: F32, params: SamplingBatch) -> I32:
        ids = [sampling.sample_row(row, params, b) for b, row in enumerate(logits)]
        return np.array(ids, dtype=np.int32)

    def top_logprobs(self, logits: F32, token_ids: I32, num_top: int) -> tuple[F32, I32, F32]:
        return sampling.top_logprobs(logits, token_ids, num_top)


def _matmul(x: F32, weight: Weight) -> F32:
    """[T, N] = x @ weight.T, one matrix-vector product per row."""
    out = np.empty((x.shape[0], weight.num_out), np.float32)
    if weight.dtype is WeightDtype.INT8:
        quantized, row_scales = quantize_int8(x)
        return _int8_product(quantized, weight, row_scales)
    if weight.dtype is WeightDtype.INT4:
        for t, row in enumerate(x):
            out[t] = _int4_row(row, weight)
        return out
    if weight.dtype is WeightDtype.W8A8G64:
        for t, row in enumerate(x):
            out[t] = _w8a8_row(row, weight)
        return out
    if weight.dtype is WeightDtype.W8A16:
        coarse, fine, row_scales = split_int15(x)
        part = _int8_product(fine, weight, row_scales) * np.float32(1 / 128)
        return _int8_product(coarse, weight, row_scales) + part
    values = weight.dequantized()
    for t, row in enumerate(round_bf16(x) if weight.dtype is WeightDtype.BF16 else x):
        out[t] = values @ np.ascontiguousarray(row)
    return out


def _int8_product(rows: I8, weight: Weight, row_scales: F32) -> F32:
    """[T, N] of int8 rows [T, K] with scales [T]: exact sums, then one rounding."""
    out = np.empty((rows.shape[0], weight.num_out), np.float32)
    wide = weight.values.astype(np.int32)
    for t, row in enumerate(rows.astype(np.int32)):
        out[t] = (wide @ row).astype(np.float32) * (row_scales[t] * weight.scales)
    return out


def _w8a8_row(row: F32, weight: Weight) -> F32:
    """[N]: groups of 64 k in ascending order, added by fused multiply-adds."""
    quantized, scales = quantize_int8(split_groups(row, INT8_GROUP))
    values = split_groups(weight.values, INT8_GROUP).astype(np.int32)
    dots = (values * quantized.astype(np.int32)).sum(axis=2).astype(np.float32)
    out = np.zeros(weight.num_out, np.float32)
    for g, scale in enumerate(scales):
        out = _multiply_add(scale, dots[:, g], out)
    return out * weight.scales


def _int4_row(row: F32, weight: Weight) -> F32:
    """[N]: groups of 32 k in ascending order, added by fused multiply-adds."""
    quantized, scales = quantize_int8(split_groups(row))
    sums = scales * quantized.sum(axis=1, dtype=np.int32).astype(np.float32)
    nibbles = split_groups(weight.values).astype(np.int32)
    dots = (nibbles * quantized.astype(np.int32)).sum(axis=2).astype(np.float32)
    out = np.zeros(weight.num_out, np.float32)
    for g, scale in enumerate(scales):
        out = _multiply_add(dots[:, g], scale * weight.scales[:, g], out)
        out = _multiply_add(sums[g], weight.lows[:, g], out)
    return out


def _multiply_add(a: F32 | np.float32, b: F32, c: F32) -> F32:
    """a * b + c, rounded once but for rare ties: float64 holds the product, not always the sum."""
    wide = np.multiply(a, b, dtype=np.float64) + c
    return wide.astype(np.float32)


def _swiglu(x: F32, gate_up: Weight, down: Weight) -> F32:
    gate, up = np.split(_matmul(x, gate_up), 2, axis=1)
    with np.errstate(over="ignore"):
        silu: F32 = np.divide(gate, np.float32(1) + np.exp(-gate))
    return _matmul(silu * up, down)
