"""Builders of the two kinds of attention from checkpoint weights.

Projections that read the same input are stacked into one matrix. DeepSeek's rotary rows come in
(even, odd) pairs and are permuted here, so that operators only know rotation in halves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from xdeepserve.models.spec import GqaSpec, MlaSpec
from xdeepserve.models.weights import Weights
from xdeepserve.ops import F32, AttentionLayer, GqaLayer, LayerFrame, MlaLayer, PackedWeight, QKNorm

LATENT_NORM_EPS: Final = 1e-6
"""Of latent attention's inner norms: fixed by the architecture, whatever rms_norm_eps says."""


class AttentionBuilder:
    """Builds one layer's attention; `rope` is the table that all layers share."""

    def __init__(
        self, weights: Weights, *, hidden_size: int, norm_eps: float, rope: F32, layer_idx: int
    ) -> None:
        self._weights = weights
        self._hidden = hidden_size
        self._norm_eps = norm_eps
        self._rope = rope
        self._ours = f"layers.{layer_idx}.attention"
        self._theirs = f"model.layers.{layer_idx}.self_attn"

    def layer(self, spec: GqaSpec | MlaSpec, frame: LayerFrame) -> AttentionLayer:
        """The attention that the model has."""
        return self.gqa(spec, frame) if isinstance(spec, GqaSpec) else self.mla(spec, frame)

    def gqa(self, spec: GqaSpec, frame: LayerFrame) -> GqaLayer:
        """Grouped-query attention: q, k and v in one matrix."""
        heads = {"q": spec.num_heads, "k": spec.num_kv_heads, "v": spec.num_kv_heads}
        rows = [(f"{self._theirs}.{x}_proj", count * spec.head_dim) for x, count in heads.items()]
        qkv = self._weights.linear(f"{self._ours}.qkv", rows, self._hidden)
        bias = self._weights.bias(f"{self._ours}.qkv_bias", rows) if spec.qkv_bias else None
        norm = None
        if spec.qk_norm:
            norm = QKNorm(
                self._vector("q_norm", "q_norm", spec.head_dim),
                self._vector("k_norm", "k_norm", spec.head_dim),
                self._norm_eps,
            )
        output = self._output(spec.num_heads * spec.head_dim)
        output_bias = self._output_bias() if spec.output_bias else None
        return GqaLayer(
            frame=frame,
            qkv=qkv,
            qkv_bias=bias,
            output=output,
            output_bias=output_bias,
            norm=norm,
            rope=self._rope,
            num_heads=spec.num_heads,
            scale=spec.scale,
        )

    def mla(self, spec: MlaSpec, frame: LayerFrame) -> MlaLayer:
        """Latent attention in absorbed form."""
        query = query_norm = None
        if spec.q_lora_rank is not None:
            query = self._load("query", lambda: self._query_rows(spec, "q_b_proj"))
            query_norm = self._vector("query_norm", "q_a_layernorm", spec.q_lora_rank)
        return MlaLayer(
            frame=frame,
            latents=self._load("latents", lambda: self._latent_rows(spec)),
            latents_bias=self._latents_bias(spec) if spec.bias else None,
            query=query,
            query_norm=query_norm,
            latent_norm=self._vector("latent_norm", "kv_a_layernorm", spec.kv_lora_rank),
            norm_eps=LATENT_NORM_EPS,
            key_absorb=self._absorb(spec, "key_absorb"),
            value_absorb=self._absorb(spec, "value_absorb"),
            output=self._output(spec.num_heads * spec.v_head_dim),
            output_bias=self._output_bias() if spec.bias else None,
            rope=self._rope,
            scale=spec.scale,
        )

    def _latent_rows(self, spec: MlaSpec) -> F32:
        if spec.q_lora_rank is None:
            query = self._query_rows(spec, "q_proj")
        else:
            name = f"{self._theirs}.q_a_proj.weight"
            query = self._weights.read(name, spec.q_lora_rank, self._hidden)
        width = spec.kv_lora_rank + spec.qk_rope_head_dim
        name = f"{self._theirs}.kv_a_proj_with_mqa.weight"
        return np.concatenate(
            [query, in_halves(self._weights.read(name, width, self._hidden), spec)]
        )

    def _latents_bias(self, spec: MlaSpec) -> F32:
        def load() -> F32:
            width = spec.kv_lora_rank + spec.qk_rope_head_dim
            latent = self._weights.read(f"{self._theirs}.kv_a_proj_with_mqa.bias", width)
            if spec.q_lora_rank is None:  # q_proj has no bias
                query = np.zeros(spec.num_heads * spec.qk_head_dim, np.float32)
            else:
                query = self._weights.read(f"{self._theirs}.q_a_proj.bias", spec.q_lora_rank)
            return np.concatenate([query, in_halves(latent, spec)])

        return self._weights.provider.array(f"{self._ours}.latents_bias", load)

    def _query_rows(self, spec: MlaSpec, part: str) -> F32:
        columns = spec.q_lora_rank or self._hidden
        rows = spec.num_heads * spec.qk_head_dim
        weight = self._weights.read(f"{self._theirs}.{part}.weight", rows, columns)
        heads = weight.reshape(spec.num_heads, spec.qk_head_dim, columns)
        return np.concatenate([in_halves(head, spec) for head in heads])

    def _absorb(self, spec: MlaSpec, name: str) -> PackedWeight:
        """A matrix per head from kv_b_proj: [h, R, nope] for keys, [h, v, R] for values."""
        nope, rank = spec.qk_nope_head_dim, spec.kv_lora_rank
        per_head = nope + spec.v_head_dim

        def load() -> F32:
            theirs = f"{self._theirs}.kv_b_proj.weight"
            weight = self._weights.read(theirs, spec.num_heads * per_head, rank)
            heads = weight.reshape(spec.num_heads, per_head, rank)
            if name == "key_absorb":
                return np.ascontiguousarray(heads[:, :nope].transpose(0, 2, 1))
            return np.ascontiguousarray(heads[:, nope:])

        return self._weights.packed(f"{self._ours}.{name}", load)

    def _load(self, name: str, load: Callable[[], F32]) -> PackedWeight:
        return self._weights.packed(f"{self._ours}.{name}", load)

    def _vector(self, ours: str, theirs: str, size: int) -> F32:
        return self._weights.vector(f"{self._ours}.{ours}", f"{self._theirs}.{theirs}.weight", size)

    def _output(self, columns: int) -> PackedWeight:
        rows = [(f"{self._theirs}.o_proj", self._hidden)]
        return self._weights.linear(f"{self._ours}.output", rows, columns)

    def _output_bias(self) -> F32:
        rows = [(f"{self._theirs}.o_proj", self._hidden)]
        return self._weights.bias(f"{self._ours}.output_bias", rows)


def in_halves(rows: F32, spec: MlaSpec) -> F32:
    """`rows` with the trailing rotary ones permuted from (even, odd) pairs into two halves."""
    if not spec.rope_interleaved:
        return rows
    split = len(rows) - spec.qk_rope_head_dim
    return np.concatenate([rows[:split], rows[split::2], rows[split + 1 :: 2]])
