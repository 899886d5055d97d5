"""The operator contract: the `Ops` protocol that every backend implements.

Law 1: each output row depends on its own input row (and KV) alone, with a fixed order of every
reduction, whatever the batch, the tile or the number of threads. Shape letters as in `types`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

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


class Ops(Protocol):
    """One backend of the operator library. Thread: one caller at a time."""

    name: str
    layout: str

    @property
    def outlier_dtype(self) -> WeightDtype:
        """Of int8 weights that meet outliers: w8a8g64, or w8a16 where that is faster."""
        ...

    # -- weights --------------------------------------------------------------------------------

    def pack(self, weight: F32, *, dtype: WeightDtype) -> PackedWeight:
        """Pack [N, K] or [G, N, K] float32 values for this backend. Copies."""
        ...

    def unpack(self, weight: PackedWeight) -> F32:
        """[G, N, K] float32 as the GEMM sees the weight (after rounding or quantization)."""
        ...

    # -- dense ----------------------------------------------------------------------------------

    def embed(self, table: Array, token_ids: I32) -> F32:
        """[T, H] rows of `table` [V, H] (float32, or uint16 bfloat16 bits) at `token_ids` [T]."""
        ...

    def linear(self, x: F32, weight: PackedWeight, bias: F32 | None = None) -> F32:
        """[T, N] = x [T, K] @ weight.T (+ bias [N]); weight has G = 1."""
        ...

    def grouped_linear(self, x: F32, weight: PackedWeight) -> F32:
        """[T, G, N] from x [T, G, K]: group g uses its own weight (MLA's per-head matrices)."""
        ...

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        """[T, H] = x / sqrt(mean(x^2) + eps) * weight [H]."""
        ...

    def add_rms_norm(self, residual: F32, x: F32, weight: F32, eps: float) -> tuple[F32, F32]:
        """(residual + x, rms_norm of it), both [T, H]; inputs are left as they are."""
        ...

    def swiglu_mlp(
        self, x: F32, gate_up: PackedWeight, down: PackedWeight, out: F32 | None = None
    ) -> F32:
        """[T, H] = (silu(x @ gate.T) * (x @ up.T)) @ down.T; gate_up is [1, 2I, H], gate first.

        Written to `out` [T, H] and returned; None = to a new array.
        """
        ...

    def quantize_rows(self, x: F32) -> tuple[I8, F32]:
        """Int8 rows [T, K] in [-127, 127] and scales [T] = max|row| / 127 (0 for a zero row)."""
        ...

    # -- attention ------------------------------------------------------------------------------

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
        """Split, norm and rotate q and k, write k and v into the cache, return q [T, Hq, D].

        Args:
            qkv: [T, (Hq + 2 Hkv) * D]: all q heads, then k heads, then v heads.
            rope: [max_positions, rotary_dim] float32: cos of each of the rotary_dim/2 frequencies,
                then sin. The first rotary_dim entries of a head are rotated in halves (entry i
                with i + rotary_dim/2); the rest pass through.
        """
        ...

    def paged_attention(self, q: F32, batch: AttentionBatch, kv: KVLayer, *, scale: float) -> F32:
        """Causal grouped-query attention [T, Hq, D] over the paged cache.

        KV is walked in partitions of a fixed number of positions from position 0, so a row's
        result depends only on its own context, not on chunking or batch.
        """
        ...

    def rope(self, x: F32, rope: F32, positions: I32) -> F32:
        """[T, h, D] with the first rotary_dim entries of each head rotated (see rope_kv_write)."""
        ...

    def mla_kv_write(self, latent: F32, k_rope: F32, batch: AttentionBatch, kv: KVLayer) -> None:
        """Write latent [T, R] (normed) and k_rope [T, Dr] (rotated) into the MLA cache."""
        ...

    def mla_attention(
        self, q_latent: F32, q_rope: F32, batch: AttentionBatch, kv: KVLayer, *, scale: float
    ) -> F32:
        """Latent attention in absorbed form: [T, Hq, R] from q_latent [T, Hq, R] and q_rope.

        Score = q_latent . latent + q_rope . k_rope; the value of a position is its latent.
        Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.
        """
        ...

    def gqa_layer(
        self,
        layer: GqaLayer,
        residual: F32,
        ffn_output: F32 | None,
        batch: AttentionBatch,
        kv: KVLayer,
    ) -> AttentionOutput:
        """The attention side of a layer: norm, QKV, attention, output, norm, router.

        Equals `composed.gqa_layer` bit for bit.

        Args:
            layer: weights.
            residual: [T, H] residual stream before the previous layer's FFN output was added.
            ffn_output: [T, H] of the previous layer; None for the first layer.
            batch: which tokens these are and where their KV lives.
            kv: this layer's cache; this step's tokens are written.
        """
        ...

    def mla_layer(
        self,
        layer: MlaLayer,
        residual: F32,
        ffn_output: F32 | None,
        batch: AttentionBatch,
        kv: KVLayer,
    ) -> AttentionOutput:
        """As gqa_layer, with latent attention; equals `composed.mla_layer` bit for bit."""
        ...

    # -- experts --------------------------------------------------------------------------------

    def gate_topk(self, logits: F32, spec: GateSpec, bias: F32 | None = None) -> tuple[I32, F32]:
        """(topk_ids [T, K], topk_weights [T, K]), best first, ties by lower id."""
        ...

    def expert_mlp(
        self,
        x: F32,
        num_tokens_per_expert: I32,
        gate_up: PackedWeight,
        down: PackedWeight,
        out: F32 | None = None,
    ) -> F32:
        """Grouped SwiGLU: rows x [R, H] sorted by expert -> [R, H], to `out` as in swiglu_mlp.

        num_tokens_per_expert [E] sums to R; gate_up is [E, 2I, H], down [E, H, I]. A row's result
        equals swiglu_mlp with that expert's weights, bit for bit.
        """
        ...

    def combine_topk(self, rows: F32, row_of_slot: I32, topk_weights: F32) -> F32:
        """[T, H] = sum over slots k ascending of topk_weights[t, k] * rows[row_of_slot[t, k]].

        row_of_slot [T, K] int32, -1 = skip the slot.
        """
        ...

    def routed_experts(
        self, x: F32, topk_ids: I32, topk_weights: F32, gate_up: PackedWeight, down: PackedWeight
    ) -> F32:
        """[T, H]: all experts of the tokens x [T, H], added up; topk_ids [T, K], -1 = skip.

        Equals `composed.routed_experts` bit for bit.
        """
        ...

    # -- all of it -------------------------------------------------------------------------------

    def decoder_layers(
        self,
        stack: DecoderStack,
        hidden_states: F32,
        batch: AttentionBatch,
        kv_layers: Sequence[KVLayer],
    ) -> F32:
        """[T, H]: hidden_states [T, H] through all layers, FFNs and experts included.

        Equals `composed.decoder_layers` bit for bit. Nobody can look between the layers; the GIL
        is released once for all of them.

        Args:
            stack: the layers.
            hidden_states: the embedded tokens; left as they are.
            batch: which tokens these are and where their KV lives.
            kv_layers: the cache of each layer; this step's tokens are written.
        """
        ...

    # -- next token -----------------------------------------------------------------------------

    def lm_head(self, x: F32, weight: PackedWeight, num_greedy: int) -> tuple[I32, F32]:
        """`linear` that keeps no logits where only the largest counts.

        Args:
            x: [T, K]; its first num_greedy rows want no more than a token id.
            weight: G = 1, N = V.
            num_greedy: 0 to T.

        Returns:
            (ids [num_greedy] of the largest logit, the lowest id of a tie; logits
            [T - num_greedy, V] of the other rows), as `linear` and `sample` give them.
        """
        ...

    def penalize(
        self, logits: F32, prompt: I32, output: I32, penalties: Penalties
    ) -> tuple[I32, F32]:
        """Penalize one row of logits [V] in place.

        Args:
            logits: [V].
            prompt: ids that count for the repetition penalty only.
            output: ids that count for every penalty.
            penalties: computed in float32.

        Returns:
            (distinct ids of both [n], the logits [n] that they had).
        """
        ...

    def sample(self, logits: F32, params: SamplingBatch) -> I32:
        """Token ids [B] from logits [B, V].

        Order of filters: temperature, top_k, top_p, min_p. Candidates are ordered by descending
        logit, ties by lower id, and the token is found by inverse CDF at `uniform`.
        """
        ...

    def top_logprobs(self, logits: F32, token_ids: I32, num_top: int) -> tuple[F32, I32, F32]:
        """Log softmax: of token_ids ([B]), and the num_top best ids and values ([B, num_top])."""
        ...
