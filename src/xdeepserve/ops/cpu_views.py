"""Native views of weights, caches, batches and layers: made once, kept with their owners.

A call of a fused operator then passes a few objects instead of dozens of arrays.
"""

from __future__ import annotations

from typing import Any

from xdeepserve import _native
from xdeepserve.ops.types import (
    AttentionBatch,
    AttentionLayer,
    DecoderStack,
    GateSpec,
    GqaLayer,
    KVLayer,
    LayerFrame,
    MlaLayer,
    Mlp,
    PackedWeight,
    WeightDtype,
)

DTYPE_CODES = {
    WeightDtype.FLOAT32: 0,
    WeightDtype.BF16: 1,
    WeightDtype.INT8: 2,
    WeightDtype.INT4: 3,
    WeightDtype.W8A16: 4,
    WeightDtype.W8A8G64: 5,
}
SCORINGS = ("softmax", "sigmoid")

_Gate = tuple[int, bool, bool, int, int, float]


def shape_of(weight: PackedWeight) -> tuple[int, int, int, int]:
    """(dtype code, G, N, K).

    Raises:
        ValueError: the weight is packed for another backend.
    """
    if weight.layout != _native.LAYOUT:
        raise ValueError(
            f"weight has layout {weight.layout!r}; this backend reads {_native.LAYOUT!r}"
        )
    return (DTYPE_CODES[weight.dtype], *weight.shape)


def weight_view(weight: PackedWeight) -> _native.Weight:
    """The weight's view; errors as `shape_of`."""
    if weight.native is None:
        code, *shape = shape_of(weight)
        _keep(weight, _native.Weight(weight.data, code, tuple(shape)))
    view: _native.Weight = weight.native
    return view


def cache_view(kv: KVLayer) -> _native.Cache:
    """The cache's view."""
    if kv.native is None:
        _keep(kv, _native.Cache(kv.k, kv.v, kv.scales))
    view: _native.Cache = kv.native
    return view


def batch_view(batch: AttentionBatch, block_size: int) -> _native.Batch:
    """The batch's view, for caches of `block_size`."""
    if batch.native is None or batch.native.block_size != block_size:
        view = _native.Batch(
            batch.query_start,
            batch.seq_lens,
            batch.block_tables,
            batch.positions,
            batch.slot_mapping,
            block_size,
        )
        _keep(batch, view)
    kept: _native.Batch = batch.native
    return kept


def layer_view(layer: AttentionLayer) -> _native.Layer:
    """The layer's view."""
    if layer.native is None:
        _keep(layer, _make_gqa(layer) if isinstance(layer, GqaLayer) else _make_mla(layer))
    view: _native.Layer = layer.native
    return view


def stack_view(stack: DecoderStack) -> _native.Stack:
    """The view of all layers."""
    if stack.native is None:
        view = _native.Stack()
        for layer in stack.layers:
            attention = layer_view(layer.attention)
            view.add_layer(attention, *_mlp_views(layer.ffn), *_mlp_views(layer.experts))
        _keep(stack, view)
    kept: _native.Stack = stack.native
    return kept


def gate_numbers(spec: GateSpec) -> _Gate:
    """A gate as the native core takes it.

    Raises:
        ValueError: unknown scoring.
    """
    if spec.scoring not in SCORINGS:
        raise ValueError(f"gate scoring {spec.scoring!r} is unknown; use {SCORINGS}")
    is_sigmoid = spec.scoring == "sigmoid"
    groups = (spec.num_groups, spec.topk_groups)
    return (spec.top_k, is_sigmoid, spec.renormalize, *groups, spec.scaling)


def _make_frame(frame: LayerFrame) -> _native.Frame:
    view = _native.Frame(frame.input_norm, frame.ffn_norm, frame.norm_eps)
    router = frame.router
    if router is not None:
        weight = weight_view(router.weight)
        view.set_router(weight, router.correction_bias, gate_numbers(router.spec))
    return view


def _make_gqa(layer: GqaLayer) -> _native.Layer:
    norm = layer.norm
    return _native.gqa_layer(
        _make_frame(layer.frame),
        weight_view(layer.qkv),
        layer.qkv_bias,
        weight_view(layer.output),
        layer.output_bias,
        norm.q_weight if norm else None,
        norm.k_weight if norm else None,
        norm.eps if norm else 0.0,
        layer.rope,
        layer.num_heads,
        layer.scale,
    )


def _make_mla(layer: MlaLayer) -> _native.Layer:
    return _native.mla_layer(
        _make_frame(layer.frame),
        weight_view(layer.latents),
        layer.latents_bias,
        None if layer.query is None else weight_view(layer.query),
        layer.query_norm,
        layer.latent_norm,
        layer.norm_eps,
        weight_view(layer.key_absorb),
        weight_view(layer.value_absorb),
        weight_view(layer.output),
        layer.output_bias,
        layer.rope,
        layer.scale,
    )


def _mlp_views(mlp: Mlp | None) -> tuple[_native.Weight | None, _native.Weight | None]:
    return (None, None) if mlp is None else (weight_view(mlp.gate_up), weight_view(mlp.down))


def _keep(owner: Any, view: object) -> None:
    """Frozen owners are values; their views are a cache beside the value."""
    object.__setattr__(owner, "native", view)
