"""Latent attention: normed hidden states in, attention output out.

Writes this step's latents into the layer's paged cache and attends over it. Nothing here knows of
residuals, routers or transport. (Grouped-query attention is one operator, `Ops.gqa_layer`.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xdeepserve.models.spec import MlaSpec
from xdeepserve.ops import F32, AttentionBatch, KVLayer, Ops, PackedWeight


@dataclass(frozen=True, slots=True)
class MlaAttention:
    """Latent attention, always absorbed: queries go to the latent space, values come back.

    One form for prefill and decode keeps a row's result independent of chunking.
    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.2.

    Attributes:
        latents: stack of the query projection (down to q_lora_rank, or straight to the heads) and
            the projection to latent + rotary key.
        query: q_lora_rank -> heads; None when `latents` already gives the heads.
        key_absorb: [heads, kv_lora_rank, qk_nope_head_dim], query -> latent space.
        value_absorb: [heads, v_head_dim, kv_lora_rank], latent -> value.
    """

    spec: MlaSpec
    rope: F32
    latents: PackedWeight
    latents_bias: F32 | None
    query: PackedWeight | None
    query_norm: F32 | None
    latent_norm: F32
    key_absorb: PackedWeight
    value_absorb: PackedWeight
    output: PackedWeight
    output_bias: F32 | None

    LATENT_NORM_EPS = 1e-6  # fixed by the architecture, whatever rms_norm_eps says

    def __call__(self, ops: Ops, hidden_states: F32, batch: AttentionBatch, kv: KVLayer) -> F32:
        spec = self.spec
        projected = ops.linear(hidden_states, self.latents, self.latents_bias)
        split = projected.shape[1] - spec.kv_lora_rank - spec.qk_rope_head_dim
        self._write_kv(ops, projected[:, split:], batch, kv)
        q = self._query_heads(ops, np.ascontiguousarray(projected[:, :split]))
        q_nope = np.ascontiguousarray(q[:, :, : spec.qk_nope_head_dim])
        q_rope = np.ascontiguousarray(q[:, :, spec.qk_nope_head_dim :])
        q_rope = ops.rope(q_rope, self.rope, batch.positions)
        q_latent = ops.grouped_linear(q_nope, self.key_absorb)
        attended = ops.mla_attention(q_latent, q_rope, batch, kv, scale=spec.scale)
        values = ops.grouped_linear(attended, self.value_absorb)
        return ops.linear(_flatten_heads(values), self.output, self.output_bias)

    def _query_heads(self, ops: Ops, q: F32) -> F32:
        if self.query is not None and self.query_norm is not None:
            q = ops.linear(ops.rms_norm(q, self.query_norm, self.LATENT_NORM_EPS), self.query)
        return q.reshape(q.shape[0], self.spec.num_heads, self.spec.qk_head_dim)

    def _write_kv(self, ops: Ops, projected: F32, batch: AttentionBatch, kv: KVLayer) -> None:
        rank = self.spec.kv_lora_rank
        latent = np.ascontiguousarray(projected[:, :rank])
        latent = ops.rms_norm(latent, self.latent_norm, self.LATENT_NORM_EPS)
        k_rope = np.ascontiguousarray(projected[:, None, rank:])
        k_rope = ops.rope(k_rope, self.rope, batch.positions)
        ops.mla_kv_write(latent, k_rope[:, 0], batch, kv)


def _flatten_heads(x: F32) -> F32:
    return x.reshape(x.shape[0], -1)
