"""The operator contract: types and the `Ops` protocol every backend implements.

Activations between operators are C-contiguous float32 arrays; weights are opaque `PackedWeight`
objects, packed once by the backend that will read them and mapped from a file afterwards.
Law 1: each output row depends on its own input row (and KV) alone, with a fixed order of every
reduction, whatever the batch, the tile or the number of threads.

Shape letters: T tokens, B sequences, H hidden, D head dim, V vocabulary, E experts, K top-k,
R rows sorted by expert, N output features, I inner features.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I8 = npt.NDArray[np.int8]
U8 = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]


class WeightDtype(enum.StrEnum):
    """Precision classes of a packed weight.

    float32: float32 weights and activations. bf16: weights and the activations entering the GEMM
    rounded to bfloat16 (nearest even), float32 accumulation. int8: symmetric int8 weights with one
    scale per output feature, activations quantized per row at run time to [-127, 127], exact int32
    accumulation, result = float(acc) * (row_scale * column_scale).
    """

    FLOAT32 = "float32"
    BF16 = "bf16"
    INT8 = "int8"


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A stack of G linear weights [G, N, K] in a backend's own layout.

    Only the backend whose `layout` it carries may look inside `data`. Groups are experts or heads;
    a plain linear has G = 1. The bytes of one group are contiguous and all groups equally long, so
    a slice of experts is a slice of `data`.

    Attributes:
        layout: backend layout id with version, for example "panel32/1".
        dtype: precision class.
        shape: (G, N, K) of the logical weight.
        data: [nbytes] uint8, 64-byte aligned; possibly a read-only memory map.
    """

    layout: str
    dtype: WeightDtype
    shape: tuple[int, int, int]
    data: U8

    def groups(self, start: int, stop: int) -> PackedWeight:
        """The weights of groups [start, stop), sharing memory."""
        stride = self.data.size // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        return PackedWeight(
            self.layout, self.dtype, shape, self.data[start * stride : stop * stride]
        )


@dataclass(frozen=True, slots=True)
class KVLayer:
    """Paged cache of one layer; slot s lives in block s // block_size at s % block_size.

    Attributes:
        k: [num_blocks, num_kv_heads, block_size, D] float32, or uint16 holding bfloat16 bits.
            For MLA: one head whose row is the normed latent followed by the rotated rope key.
        v: like k; None for MLA, where values are read from the latent.
    """

    k: Array
    v: Array | None

    @property
    def block_size(self) -> int:
        return int(self.k.shape[2])


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Which tokens of a step belong to which sequence, and where their KV lives.

    Attributes:
        query_start: [B + 1] int32; tokens of sequence b are rows query_start[b] to [b + 1].
        seq_lens: [B] int32; context length including this step's tokens. Row i of sequence b has
            position seq_lens[b] - (query_start[b + 1] - query_start[b]) + i and attends to all
            positions up to its own.
        block_tables: [B, max_blocks] int32, physical block ids, padded with -1.
        positions: [T] int32.
        slot_mapping: [T] int32; where token t's KV is written.
    """

    query_start: I32
    seq_lens: I32
    block_tables: I32
    positions: I32
    slot_mapping: I32


@dataclass(frozen=True, slots=True)
class QKNorm:
    """RMS norm over each head of q and k before rotation (Qwen3, GLM-4.5). Weights [D] float32."""

    q_weight: F32
    k_weight: F32
    eps: float


@dataclass(frozen=True, slots=True)
class GateSpec:
    """How a router turns scores into experts.

    softmax: scores = softmax(logits) over all E. sigmoid: scores = sigmoid(logits), choice by
    scores + bias, weights from scores alone (DeepSeek-V3 `noaux_tc`). With num_groups > 1 only the
    topk_groups groups with the largest sum of their two best (biased) scores may be chosen. With
    renormalize the chosen weights are divided by their sum (plus 1e-20 for sigmoid); then all are
    multiplied by scaling.
    """

    num_experts: int
    top_k: int
    scoring: str
    renormalize: bool
    num_groups: int = 1
    topk_groups: int = 1
    scaling: float = 1.0


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Per-row sampling parameters; all arrays have length B.

    Attributes:
        temperature: float32; 0 means greedy (argmax, lowest id wins ties).
        top_k: int32; 0 = off.
        top_p: float32; 1 = off.
        min_p: float32; 0 = off.
        uniform: float64 in [0, 1): the counter-based random number of (seed, position).
    """

    temperature: F32
    top_k: I32
    top_p: F32
    min_p: F32
    uniform: npt.NDArray[np.float64]


class Ops(Protocol):
    """One backend of the operator library. Thread: one caller at a time."""

    name: str
    layout: str

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

    def swiglu_mlp(self, x: F32, gate_up: PackedWeight, down: PackedWeight) -> F32:
        """[T, H] = (silu(x @ gate.T) * (x @ up.T)) @ down.T; gate_up is [1, 2I, H], gate first."""
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

    # -- experts --------------------------------------------------------------------------------

    def gate_topk(self, logits: F32, spec: GateSpec, bias: F32 | None = None) -> tuple[I32, F32]:
        """(topk_ids [T, K], topk_weights [T, K]), best first, ties by lower id."""
        ...

    def expert_mlp(
        self, x: F32, num_tokens_per_expert: I32, gate_up: PackedWeight, down: PackedWeight
    ) -> F32:
        """Grouped SwiGLU: rows x [R, H] sorted by expert -> [R, H].

        num_tokens_per_expert [E] sums to R; gate_up is [E, 2I, H], down [E, H, I]. A row's result
        equals swiglu_mlp with that expert's weights, bit for bit.
        """
        ...

    def combine_topk(self, rows: F32, row_of_slot: I32, topk_weights: F32) -> F32:
        """[T, H] = sum over slots k ascending of topk_weights[t, k] * rows[row_of_slot[t, k]].

        row_of_slot [T, K] int32, -1 = skip the slot.
        """
        ...

    # -- sampling -------------------------------------------------------------------------------

    def sample(self, logits: F32, params: SamplingBatch) -> I32:
        """Token ids [B] from logits [B, V].

        Order of filters: temperature, top_k, top_p, min_p. Candidates are ordered by descending
        logit, ties by lower id, and the token is found by inverse CDF at `uniform`.
        """
        ...

    def top_logprobs(self, logits: F32, token_ids: I32, num_top: int) -> tuple[F32, I32, F32]:
        """Log softmax: of token_ids ([B]), and the num_top best ids and values ([B, num_top])."""
        ...
