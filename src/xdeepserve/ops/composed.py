"""A layer's parts composed of plain operators: what the fused operators of a backend must equal.

residual (+ FFN output) -> norm -> attention -> + residual -> norm -> router -> FFN, experts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xdeepserve.ops.contract import Ops
from xdeepserve.ops.types import (
    F32,
    I32,
    AttentionBatch,
    AttentionLayer,
    AttentionOutput,
    DecoderLayer,
    DecoderStack,
    GqaLayer,
    KVLayer,
    LayerFrame,
    MlaLayer,
    PackedWeight,
)


def attention_layer(
    ops: Ops,
    layer: AttentionLayer,
    residual: F32,
    ffn_output: F32 | None,
    batch: AttentionBatch,
    kv: KVLayer,
) -> AttentionOutput:
    """`Ops.gqa_layer` or `Ops.mla_layer`, as the layer wants it."""
    if isinstance(layer, GqaLayer):
        return ops.gqa_layer(layer, residual, ffn_output, batch, kv)
    return ops.mla_layer(layer, residual, ffn_output, batch, kv)


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


def mla_layer(
    ops: Ops,
    layer: MlaLayer,
    residual: F32,
    ffn_output: F32 | None,
    batch: AttentionBatch,
    kv: KVLayer,
) -> AttentionOutput:
    """`Ops.mla_layer` by other operators."""
    residual, normed = enter(ops, layer.frame, residual, ffn_output)
    projected = ops.linear(normed, layer.latents, layer.latents_bias)
    queries = projected.shape[1] - layer.key_absorb.shape[1] - layer.rope.shape[1]
    _write_latents(ops, layer, projected[:, queries:], batch, kv)
    plain, rotated = _query_heads(ops, layer, projected[:, :queries], batch)
    q_latent = ops.grouped_linear(plain, layer.key_absorb)
    attended = ops.mla_attention(q_latent, rotated, batch, kv, scale=layer.scale)
    values = ops.grouped_linear(attended, layer.value_absorb)
    flat = values.reshape(values.shape[0], -1)
    return leave(ops, layer.frame, residual, ops.linear(flat, layer.output, layer.output_bias))


def _write_latents(
    ops: Ops, layer: MlaLayer, projected: F32, batch: AttentionBatch, kv: KVLayer
) -> None:
    """Norm the latents and rotate the keys of projected [T, R + Dr], and write both."""
    rank = layer.key_absorb.shape[1]
    latent = np.ascontiguousarray(projected[:, :rank])
    latent = ops.rms_norm(latent, layer.latent_norm, layer.norm_eps)
    k_rope = np.ascontiguousarray(projected[:, None, rank:])
    k_rope = ops.rope(k_rope, layer.rope, batch.positions)
    ops.mla_kv_write(latent, k_rope[:, 0], batch, kv)


def _query_heads(ops: Ops, layer: MlaLayer, q: F32, batch: AttentionBatch) -> tuple[F32, F32]:
    """Plain [T, Hq, Dn] and rotated part [T, Hq, Dr] of the heads of q [T, Q]."""
    num_heads, _, plain_dim = layer.key_absorb.shape
    q = np.ascontiguousarray(q)
    if layer.query is not None and layer.query_norm is not None:
        q = ops.linear(ops.rms_norm(q, layer.query_norm, layer.norm_eps), layer.query)
    heads = q.reshape(q.shape[0], num_heads, plain_dim + layer.rope.shape[1])
    plain = np.ascontiguousarray(heads[:, :, :plain_dim])
    rotated = np.ascontiguousarray(heads[:, :, plain_dim:])
    return plain, ops.rope(rotated, layer.rope, batch.positions)


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


def feed_forward(
    ops: Ops,
    layer: DecoderLayer,
    hidden_states: F32,
    topk_ids: I32 | None,
    topk_weights: F32 | None,
) -> F32:
    """[T, H] FFN output of a layer from hidden_states [T, H]: shared experts first, plus routed."""
    ffn, experts = layer.ffn, layer.experts
    shared = None if ffn is None else ops.swiglu_mlp(hidden_states, ffn.gate_up, ffn.down)
    if experts is None or topk_ids is None or topk_weights is None:
        assert shared is not None, "a layer has a dense FFN or experts"
        return shared
    routed = ops.routed_experts(
        hidden_states, topk_ids, topk_weights, experts.gate_up, experts.down
    )
    return routed if shared is None else shared + routed


def decoder_layers(
    ops: Ops,
    stack: DecoderStack,
    hidden_states: F32,
    batch: AttentionBatch,
    kv_layers: Sequence[KVLayer],
) -> F32:
    """`Ops.decoder_layers` by other operators."""
    residual, ffn_output = hidden_states, None
    for layer, kv in zip(stack.layers, kv_layers, strict=True):
        out = attention_layer(ops, layer.attention, residual, ffn_output, batch, kv)
        residual = out.residual
        ffn_output = feed_forward(ops, layer, out.hidden_states, out.topk_ids, out.topk_weights)
    assert ffn_output is not None, "a stack has at least one layer"
    return residual + ffn_output
