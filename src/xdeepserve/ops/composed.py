"""A layer's parts composed of plain operators: what the fused operators of a backend must equal.

residual (+ FFN output) -> norm -> attention -> + residual -> norm -> router -> FFN, experts
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xdeepserve.ops.contract import Ops
from xdeepserve.ops.types import (
    F32,
    I32,
    AttentionBatch,
    AttentionOutput,
    GqaLayer,
    KVLayer,
    LayerFrame,
    PackedWeight,
)


def enter(ops: Ops, frame: LayerFrame, residual: F32, ffn_output: F32 | None) -> tuple[F32, F32]:
    """(residual stream, normed input of the attention), both [T, H]."""
    if ffn_output is None:
        return residual, ops.rms_norm(residual, frame.input_norm, frame.norm_eps)
    return ops.add_rms_norm(residual, ffn_output, frame.input_norm, frame.norm_eps)


def leave(ops: Ops, frame: LayerFrame, residual: F32, attended: F32) -> AttentionOutput:
    """Add what the attention made, norm it for the FFN and choose experts."""
    residual, hidden = ops.add_rms_norm(residual, attended, frame.ffn_norm, frame.norm_eps)
    router = frame.router
    if router is None:
        return AttentionOutput(residual, hidden, None, None)
    logits = ops.linear(hidden, router.weight)
    topk_ids, topk_weights = ops.gate_topk(logits, router.spec, router.correction_bias)
    return AttentionOutput(residual, hidden, topk_ids, topk_weights)


def gqa_layer(
    ops: Ops,
    layer: GqaLayer,
    residual: F32,
    ffn_output: F32 | None,
    batch: AttentionBatch,
    kv: KVLayer,
) -> AttentionOutput:
    """`Ops.gqa_layer` by other operators."""
    residual, normed = enter(ops, layer.frame, residual, ffn_output)
    qkv = ops.linear(normed, layer.qkv, layer.qkv_bias)
    q = ops.rope_kv_write(qkv, layer.rope, batch, kv, num_heads=layer.num_heads, norm=layer.norm)
    attended = ops.paged_attention(q, batch, kv, scale=layer.scale)
    flat = attended.reshape(attended.shape[0], -1)
    return leave(ops, layer.frame, residual, ops.linear(flat, layer.output, layer.output_bias))


@dataclass(frozen=True, slots=True)
class Permutation:
    """Tokens sorted by expert; within an expert in order of token, then slot.

    Attributes:
        token_of_row: [R] int32.
        row_of_slot: [T, K] int32, -1 where the slot was skipped.
        num_tokens_per_expert: [E] int32, sums to R.
    """

    token_of_row: I32
    row_of_slot: I32
    num_tokens_per_expert: I32


def permute_by_expert(topk_ids: I32, num_experts: int) -> Permutation:
    """Sort the slots of topk_ids [T, K] (values in [0, num_experts), -1 = skip) by expert."""
    num_slots = topk_ids.shape[1]
    flat = topk_ids.ravel()
    order = np.argsort(flat, kind="stable")
    order = order[np.count_nonzero(flat < 0) :]
    row_of_slot = np.full(flat.size, -1, np.int32)
    row_of_slot[order] = np.arange(order.size, dtype=np.int32)
    counts = np.bincount(flat[order], minlength=num_experts).astype(np.int32)
    token_of_row = (order // num_slots).astype(np.int32)
    return Permutation(token_of_row, row_of_slot.reshape(topk_ids.shape), counts)


def routed_experts(
    ops: Ops, x: F32, topk_ids: I32, topk_weights: F32, gate_up: PackedWeight, down: PackedWeight
) -> F32:
    """`Ops.routed_experts` by other operators."""
    permutation = permute_by_expert(topk_ids, gate_up.shape[0])
    rows = x[permutation.token_of_row]
    outputs = ops.expert_mlp(rows, permutation.num_tokens_per_expert, gate_up, down)
    return ops.combine_topk(outputs, permutation.row_of_slot, topk_weights)
