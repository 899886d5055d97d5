"""`CpuOps`: the native operators behind the contract.

Only shapes outputs and calls the compiled core, which checks every argument and releases the GIL.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from xdeepserve import envs
from xdeepserve.errors import ConfigError
from xdeepserve.ops.types import (
    F32,
    I8,
    I32,
    U8,
    Array,
    AttentionBatch,
    AttentionLayer,
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

try:
    from xdeepserve import _native
    from xdeepserve.ops.cpu_views import (
        DTYPE_CODES,
        batch_view,
        cache_view,
        gate_numbers,
        layer_view,
        shape_of,
        stack_view,
        weight_view,
    )
except ImportError as exc:
    raise ConfigError(
        f"the native core is missing or does not load ({exc}); install the package with a C++ "
        "compiler present, or use the reference backend"
    ) from exc

_ALIGN = 64


class CpuOps:
    """Native backend; see `Ops` for what each operator does.

    Args:
        num_threads: operator threads; 0 = XDEEPSERVE_NUM_THREADS, or one per available core.

    Raises:
        ConfigError: XDEEPSERVE_ISA names an instruction set this machine lacks.
    """

    name = "cpu"
    layout = _native.LAYOUT

    def __init__(self, *, num_threads: int = 0) -> None:
        isa = envs.ISA.get()
        available = _native.available_isas()
        if isa != "auto" and isa not in available:
            raise ConfigError(
                f"XDEEPSERVE_ISA={isa} is not available on this machine, which has "
                f"{', '.join(available)}; unset it or choose one of these"
            )
        self.native = _native.Context(isa, num_threads or default_num_threads())

    @property
    def isa(self) -> str:
        """The instruction set in use: portable, avx2, avx512 or amx."""
        return self.native.isa

    @property
    def outlier_dtype(self) -> WeightDtype:
        """w8a16 on tiles, which would have to be stored and scaled for every group."""
        return WeightDtype.W8A16 if self.isa == "amx" else WeightDtype.W8A8G64

    @property
    def num_threads(self) -> int:
        return self.native.num_threads

    # -- weights --------------------------------------------------------------------------------

    def pack(self, weight: F32, *, dtype: WeightDtype) -> PackedWeight:
        values = np.ascontiguousarray(weight if weight.ndim == 3 else weight[None], np.float32)
        groups, n, k = values.shape
        data = _aligned_bytes(_native.packed_bytes(DTYPE_CODES[dtype], groups, n, k))
        self.native.pack(values, DTYPE_CODES[dtype], data)
        return PackedWeight(self.layout, dtype, (groups, n, k), data)

    def unpack(self, weight: PackedWeight) -> F32:
        out = np.empty(weight.shape, np.float32)
        self.native.unpack(weight.data, shape_of(weight), out)
        return out

    # -- dense ----------------------------------------------------------------------------------

    def embed(self, table: Array, token_ids: I32) -> F32:
        out = np.empty((token_ids.shape[0], table.shape[1]), np.float32)
        self.native.embed(table, token_ids, out)
        return out

    def linear(self, x: F32, weight: PackedWeight, bias: F32 | None = None) -> F32:
        out = np.empty((x.shape[0], weight.shape[1]), np.float32)
        self.native.linear(x, weight.data, shape_of(weight), bias, out)
        return out

    def grouped_linear(self, x: F32, weight: PackedWeight) -> F32:
        out = np.empty((x.shape[0], *weight.shape[:2]), np.float32)
        self.native.grouped_linear(x, weight.data, shape_of(weight), out)
        return out

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        out = np.empty_like(x)
        self.native.rms_norm(x, weight, eps, out)
        return out

    def add_rms_norm(self, residual: F32, x: F32, weight: F32, eps: float) -> tuple[F32, F32]:
        total, out = np.empty_like(x), np.empty_like(x)
        self.native.add_rms_norm(residual, x, weight, eps, total, out)
        return total, out

    def swiglu_mlp(
        self, x: F32, gate_up: PackedWeight, down: PackedWeight, out: F32 | None = None
    ) -> F32:
        return self.expert_mlp(x, np.array([x.shape[0]], np.int32), gate_up, down, out)

    def quantize_rows(self, x: F32) -> tuple[I8, F32]:
        out, scales = np.empty(x.shape, np.int8), np.empty(x.shape[0], np.float32)
        self.native.quantize_rows(x, out, scales)
        return out, scales

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
        q = np.empty((qkv.shape[0], num_heads, kv.k.shape[2]), np.float32)
        self.native.rope_kv_write(
            qkv,
            rope,
            batch_view(batch, kv.block_size),
            cache_view(kv),
            norm.q_weight if norm else None,
            norm.k_weight if norm else None,
            norm.eps if norm else 0.0,
            q,
        )
        return q

    def paged_attention(self, q: F32, batch: AttentionBatch, kv: KVLayer, *, scale: float) -> F32:
        out = np.empty_like(q)
        view = batch_view(batch, kv.block_size)
        self.native.paged_attention(q, view, cache_view(kv), scale, out)
        return out

    def rope(self, x: F32, rope: F32, positions: I32) -> F32:
        out = np.empty_like(x)
        self.native.rope(x, rope, positions, out)
        return out

    def mla_kv_write(self, latent: F32, k_rope: F32, batch: AttentionBatch, kv: KVLayer) -> None:
        view = batch_view(batch, kv.block_size)
        self.native.mla_kv_write(latent, k_rope, view, cache_view(kv))

    def mla_attention(
        self, q_latent: F32, q_rope: F32, batch: AttentionBatch, kv: KVLayer, *, scale: float
    ) -> F32:
        out = np.empty_like(q_latent)
        view = batch_view(batch, kv.block_size)
        self.native.mla_attention(q_latent, q_rope, view, cache_view(kv), scale, out)
        return out

    def gqa_layer(
        self,
        layer: GqaLayer,
        residual: F32,
        ffn_output: F32 | None,
        batch: AttentionBatch,
        kv: KVLayer,
    ) -> AttentionOutput:
        return self._attention_layer(layer, residual, ffn_output, batch, kv)

    def mla_layer(
        self,
        layer: MlaLayer,
        residual: F32,
        ffn_output: F32 | None,
        batch: AttentionBatch,
        kv: KVLayer,
    ) -> AttentionOutput:
        return self._attention_layer(layer, residual, ffn_output, batch, kv)

    def _attention_layer(
        self,
        layer: AttentionLayer,
        residual: F32,
        ffn_output: F32 | None,
        batch: AttentionBatch,
        kv: KVLayer,
    ) -> AttentionOutput:
        total, hidden = np.empty_like(residual), np.empty_like(residual)
        ids = weights = None
        if layer.frame.router is not None:
            shape = (residual.shape[0], layer.frame.router.spec.top_k)
            ids, weights = np.empty(shape, np.int32), np.empty(shape, np.float32)
        self.native.attention_layer(
            layer_view(layer),
            residual,
            ffn_output,
            batch_view(batch, kv.block_size),
            cache_view(kv),
            total,
            hidden,
            ids,
            weights,
        )
        return AttentionOutput(total, hidden, ids, weights)

    # -- experts --------------------------------------------------------------------------------

    def gate_topk(self, logits: F32, spec: GateSpec, bias: F32 | None = None) -> tuple[I32, F32]:
        _, is_sigmoid, renormalize, num_groups, topk_groups, scaling = gate_numbers(spec)
        ids = np.empty((logits.shape[0], spec.top_k), np.int32)
        weights = np.empty((logits.shape[0], spec.top_k), np.float32)
        groups = (num_groups, topk_groups)
        self.native.gate_topk(logits, bias, is_sigmoid, renormalize, groups, scaling, ids, weights)
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
        self.native.expert_mlp(
            x,
            num_tokens_per_expert,
            gate_up.data,
            shape_of(gate_up),
            down.data,
            shape_of(down),
            out,
        )
        return out

    def combine_topk(self, rows: F32, row_of_slot: I32, topk_weights: F32) -> F32:
        out = np.empty((row_of_slot.shape[0], rows.shape[1]), np.float32)
        self.native.combine_topk(rows, row_of_slot, topk_weights, out)
        return out

    def routed_experts(
        self, x: F32, topk_ids: I32, topk_weights: F32, gate_up: PackedWeight, down: PackedWeight
    ) -> F32:
        out = np.empty((x.shape[0], down.shape[1]), np.float32)
        self.native.routed_experts(
            x, topk_ids, topk_weights, weight_view(gate_up), weight_view(down), out
        )
        return out

    # -- all of it -------------------------------------------------------------------------------

    def decoder_layers(
        self,
        stack: DecoderStack,
        hidden_states: F32,
        batch: AttentionBatch,
        kv_layers: Sequence[KVLayer],
    ) -> F32:
        out = np.empty_like(hidden_states)
        view = batch_view(batch, kv_layers[0].block_size)
        caches = [cache_view(kv) for kv in kv_layers]
        self.native.decoder_layers(stack_view(stack), hidden_states, view, caches, out)
        return out

    # -- next token -----------------------------------------------------------------------------

    def lm_head(self, x: F32, weight: PackedWeight, num_greedy: int) -> tuple[I32, F32]:
        ids = np.empty(num_greedy, np.int32)
        logits = np.empty((x.shape[0] - num_greedy, weight.shape[1]), np.float32)
        self.native.lm_head(x, weight.data, shape_of(weight), ids, logits)
        return ids, logits

    def penalize(
        self, logits: F32, prompt: I32, output: I32, penalties: Penalties
    ) -> tuple[I32, F32]:
        ids = np.empty(prompt.size + output.size, np.int32)
        raw = np.empty(ids.size, np.float32)
        values = (penalties.repetition, penalties.frequency, penalties.presence)
        count = self.native.penalize(logits, prompt, output, values, ids, raw)
        return ids[:count], raw[:count]

    def sample(self, logits: F32, params: SamplingBatch) -> I32:
        out = np.empty(logits.shape[0], np.int32)
        self.native.sample(
            logits,
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.uniform,
            out,
        )
        return out

    def top_logprobs(self, logits: F32, token_ids: I32, num_top: int) -> tuple[F32, I32, F32]:
        chosen = np.empty(logits.shape[0], np.float32)
        ids = np.empty((logits.shape[0], num_top), np.int32)
        values = np.empty((logits.shape[0], num_top), np.float32)
        self.native.top_logprobs(logits, token_ids, chosen, ids, values)
        return chosen, ids, values


def default_num_threads() -> int:
    """XDEEPSERVE_NUM_THREADS, or one thread per core this process may use."""
    configured = envs.NUM_THREADS.get()
    if configured is not None:
        return configured
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _aligned_bytes(size: int) -> U8:
    raw = np.empty(size + _ALIGN, np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return raw[start : start + size]
