"""What passes in and out of operators: arrays, packed weights, batches, and layers made of them.

Activations are C-contiguous float32 arrays; weights are opaque `PackedWeight` objects, packed once
by the backend that will read them and mapped from a file afterwards.

Shape letters: T tokens, B sequences, H hidden, D head dim, V vocabulary, E experts, K top-k,
R rows sorted by expert, N output features, I inner features.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
    accumulation, result = float(acc) * (row_scale * column_scale). int4: each group of 32
    neighbours in k of an output is scale * nibble + low, nibble in [0, 15], scale and low bf16;
    activations are quantized per group of 32 as int8 quantizes a row; group dot products are exact
    and added in float32 in ascending order of k, by fused multiply-adds (see `quant`). w8a16:
    int8 weights, activations quantized per row to 15 bits, 128 * coarse + fine with both int8: two
    int8 products, coarse + fine / 128. w8a8g64: int8 weights, each group of 64 activations
    quantized as int8 quantizes a row; group sums are exact and added in ascending order, each times
    its scale, by fused multiply-adds; then times the column scale. The three with int8 weights
    share bytes.
    """

    FLOAT32 = "float32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"
    W8A16 = "w8a16"
    W8A8G64 = "w8a8g64"

    @property
    def has_int8_weights(self) -> bool:
        """Whether packed weights are those of INT8, byte by byte."""
        return self in (WeightDtype.INT8, WeightDtype.W8A16, WeightDtype.W8A8G64)


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
        native: the backend's own form of it, made at its first use.
    """

    layout: str
    dtype: WeightDtype
    shape: tuple[int, int, int]
    data: U8
    native: Any = field(default=None, init=False, repr=False, compare=False)

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
        k: [num_blocks, num_kv_heads, D, block_size] float32, uint16 holding bfloat16 bits, or int8:
            the keys of a block lie transposed, so that scores are read as they are multiplied.
            For MLA: [num_blocks, 1, block_size, D] rows, each the normed latent followed by the
            rotated rope key.
        v: [num_blocks, num_kv_heads, block_size, D], dtype of k; None for MLA, where values are
            read from the latent.
        scales: [num_blocks, num_kv_heads, 2, block_size] float32 with int8 k and v: what the keys
            (0) and the values (1) of each position are multiplied by; None otherwise. Not for MLA.
        native: the backend's own form of it, made at its first use.
    """

    k: Array
    v: Array | None
    scales: F32 | None = None
    native: Any = field(default=None, init=False, repr=False, compare=False)

    @property
    def block_size(self) -> int:
        return int((self.k if self.v is None else self.v).shape[2])


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
        native: the backend's own form of it, made at its first use.
    """

    query_start: I32
    seq_lens: I32
    block_tables: I32
    positions: I32
    slot_mapping: I32
    native: Any = field(default=None, init=False, repr=False, compare=False)


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


@dataclass(frozen=True, slots=True)
class Penalties:
    """On tokens that a sequence holds already.

    Attributes:
        repetition: positive logits of tokens of prompt and output are divided by it, negative ones
            multiplied (CTRL's rule, arXiv:1909.05858); 1 = off.
        frequency: then subtracted for each occurrence in the output.
        presence: then subtracted once from those in the output.
    """

    repetition: float
    frequency: float
    presence: float


@dataclass(frozen=True, slots=True)
class Router:
    """Chooses experts. Its weight is float32 in every precision: a flipped choice is not noise."""

    weight: PackedWeight
    correction_bias: F32 | None
    spec: GateSpec


@dataclass(frozen=True, slots=True)
class LayerFrame:
    """What surrounds a layer's attention: both norms [H], and the router of an MoE layer."""

    input_norm: F32
    ffn_norm: F32
    norm_eps: float
    router: Router | None


@dataclass(frozen=True, slots=True, eq=False)
class GqaLayer:
    """The attention side of a layer with grouped-query attention.

    Attributes:
        frame: norms and router.
        qkv: [1, (Hq + 2 Hkv) * D, H], the row-wise stack of the three projections.
        qkv_bias: [(Hq + 2 Hkv) * D] or None.
        output: [1, H, Hq * D].
        output_bias: [H] or None.
        norm: of the heads of q and k; None = there is none.
        rope: [max_positions, rotary_dim] table, shared by all layers.
        num_heads: Hq.
        scale: of the scores.
        native: the backend's own form of it, made at its first use.
    """

    frame: LayerFrame
    qkv: PackedWeight
    qkv_bias: F32 | None
    output: PackedWeight
    output_bias: F32 | None
    norm: QKNorm | None
    rope: F32
    num_heads: int
    scale: float
    native: Any = field(default=None, init=False, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class MlaLayer:
    """The attention side of a layer with latent attention, always absorbed.

    Queries go to the latent space (size R), values come back; Dn entries of a head's query are
    plain, Dr are rotated. One form for prefill and decode keeps a row's result independent of
    chunking. Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.2.

    Attributes:
        frame: norms and router.
        latents: [1, Q + R + Dr, H]: the query projection (down to a low rank Q, or straight to the
            heads), then the projection to latent and rotary key.
        latents_bias: [Q + R + Dr] or None.
        query: [1, Hq * (Dn + Dr), Q]; None when `latents` already gives the heads.
        query_norm: [Q]; None as `query`.
        latent_norm: [R].
        norm_eps: of query_norm and latent_norm.
        key_absorb: [Hq, R, Dn], query -> latent space.
        value_absorb: [Hq, Dv, R], latent -> value.
        output: [1, H, Hq * Dv].
        output_bias: [H] or None.
        rope: [max_positions, Dr] table, shared by all layers.
        scale: of the scores.
        native: the backend's own form of it, made at its first use.
    """

    frame: LayerFrame
    latents: PackedWeight
    latents_bias: F32 | None
    query: PackedWeight | None
    query_norm: F32 | None
    latent_norm: F32
    norm_eps: float
    key_absorb: PackedWeight
    value_absorb: PackedWeight
    output: PackedWeight
    output_bias: F32 | None
    rope: F32
    scale: float
    native: Any = field(default=None, init=False, repr=False)


AttentionLayer = GqaLayer | MlaLayer


@dataclass(frozen=True, slots=True, eq=False)
class Mlp:
    """SwiGLU weights: gate_up [E, 2I, H], gate first, and down [E, H, I]; E = 1 but for experts."""

    gate_up: PackedWeight
    down: PackedWeight


@dataclass(frozen=True, slots=True, eq=False)
class DecoderLayer:
    """A whole layer.

    Attributes:
        attention: all before the FFN; it has a router just where there are experts.
        ffn: dense, or all shared experts as one; None = the layer has experts only.
        experts: all routed experts; None on a dense layer.
    """

    attention: AttentionLayer
    ffn: Mlp | None
    experts: Mlp | None


@dataclass(frozen=True, slots=True, eq=False)
class DecoderStack:
    """At least one layer, all in this process. native: the backend's own form, as elsewhere."""

    layers: tuple[DecoderLayer, ...]
    native: Any = field(default=None, init=False, repr=False)


class AttentionOutput(NamedTuple):
    """What a layer's attention hands on.

    Attributes:
        residual: [T, H]; stays with the attention side.
        hidden_states: [T, H], normed; goes to FFN and experts.
        topk_ids: [T, K] logical expert ids; None on a dense layer.
        topk_weights: [T, K]; None on a dense layer.
    """

    residual: F32
    hidden_states: F32
    topk_ids: I32 | None
    topk_weights: F32 | None
