"""The cases of attention's operators: a batch of equal sequences over a bfloat16 cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import prod

import numpy as np
from benchmarks.operators import torch_attention
from benchmarks.operators.case import Calls, Case, Prepared, Sizes
from benchmarks.operators.operands import Operands, StepShape, WeightPart
from benchmarks.operators.roofline import Work
from benchmarks.operators.weights import first_linear, linear_weights

from xdeepserve.models.spec import GqaSpec, MlaSpec, ModelSpec
from xdeepserve.ops import (
    F32,
    AttentionBatch,
    GqaLayer,
    KVLayer,
    LayerFrame,
    PackedWeight,
    QKNorm,
    Router,
    WeightDtype,
)
from xdeepserve.ops.cpu_views import cache_view, layer_view


def _kv_bytes(spec: GqaSpec | MlaSpec, tokens: int) -> int:
    heads, dim = spec.kv_heads_and_dim
    return 2 * spec.num_kv_arrays * heads * dim * tokens


def _is_prefill(step: StepShape) -> str:
    return "prefill" if step.new_tokens > 1 else "decode"


def _short_steps(sizes: Sizes) -> list[StepShape]:
    """Operators that only write look at no context: the shortest of each batch."""
    shortest: dict[int, StepShape] = {}
    for step in sizes.steps():
        shortest.setdefault(step.num_tokens, step)
    return list(shortest.values())


# -- grouped-query attention --------------------------------------------------------------------


def rope_kv_write(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """A step's keys and values, to blocks that no cache holds."""
    spec = model.attention
    if not isinstance(spec, GqaSpec):
        return

    def prepare(spec: GqaSpec, step: StepShape, operands: Operands) -> Prepared:
        kv, batches = operands.contexts(spec, step)
        qkv = operands.values(step.num_tokens, first_linear(model)[1][1])
        rope, norm = operands.rope(spec, step.context), _head_norm(spec, operands)
        calls: Calls = [
            partial(
                operands.ops.rope_kv_write,
                qkv, rope, batch, kv, num_heads=spec.num_heads, norm=norm,
            )
            for batch in batches
        ]  # fmt: skip
        work = Work(memory_bytes=_kv_bytes(spec, step.num_tokens), cache_bytes=2 * qkv.nbytes)
        return Prepared(calls, work)

    for step in _short_steps(sizes):
        yield Case(
            "rope_kv_write", _is_prefill(step), step.num_tokens, step.context, "",
            partial(prepare, spec, step),
        )  # fmt: skip


def _head_norm(spec: GqaSpec, operands: Operands) -> QKNorm | None:
    if not spec.qk_norm:
        return None
    return QKNorm(operands.values(spec.head_dim), operands.values(spec.head_dim), 1e-6)


def paged_attention(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """Queries over whole contexts."""
    spec = model.attention
    if not isinstance(spec, GqaSpec):
        return

    def prepare(spec: GqaSpec, step: StepShape, operands: Operands) -> Prepared:
        kv, batches = operands.contexts(spec, step)
        q = operands.values(step.num_tokens, spec.num_heads, spec.head_dim)
        attend = partial(operands.ops.paged_attention, kv=kv, scale=spec.scale)
        calls: Calls = [partial(attend, q, batch) for batch in batches]
        return Prepared(calls, _gqa_work(spec, step))

    for step in sizes.steps():
        yield Case(
            "paged_attention", _is_prefill(step), step.num_tokens, step.context, "bf16",
            partial(prepare, spec, step),
            partial(torch_attention.grouped_query, spec, step),
        )  # fmt: skip


def _gqa_work(spec: GqaSpec, step: StepShape) -> Work:
    values = spec.num_heads * spec.head_dim
    return Work(
        memory_bytes=_kv_bytes(spec, step.cached_tokens),
        cache_bytes=8 * step.num_tokens * values,
        operations=4 * step.visible_positions * values,
        dtype=WeightDtype.BF16,
    )


def gqa_layer(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """Everything of a layer before its FFN, with bf16 weights as in every precision but float32."""
    spec = model.attention
    if not isinstance(spec, GqaSpec):
        return
    parts = [
        WeightPart(shape, WeightDtype.FLOAT32 if name == "router" else WeightDtype.BF16)
        for name, shape in linear_weights(model)
    ]
    for step in sizes.steps():
        yield Case(
            "gqa_layer", _is_prefill(step), step.num_tokens, step.context, "bf16",
            partial(_prepare_layer, model, spec, parts, step),
        )  # fmt: skip


def _prepare_layer(
    model: ModelSpec, spec: GqaSpec, parts: list[WeightPart], step: StepShape, operands: Operands
) -> Prepared:
    kv, batches = operands.contexts(spec, step)
    cache_view(kv)
    sets = operands.weights(*parts)
    layers = [_layer(model, spec, weights, step, operands) for weights in sets]
    residual = operands.values(step.num_tokens, model.hidden_size)
    calls: Calls = [
        _layer_call(operands, layers[i % len(layers)], residual, batches[i % len(batches)], kv)
        for i in range(max(len(layers), len(batches)))
    ]
    attention = _gqa_work(spec, step)
    products = 2 * step.num_tokens * sum(prod(weight.shape) for weight in sets[0])
    weight_bytes = sum(weight.data.nbytes for weight in sets[0])
    work = Work(
        memory_bytes=attention.memory_bytes + weight_bytes,
        cache_bytes=4 * residual.nbytes,
        operations=attention.operations + products,
        dtype=WeightDtype.BF16,
    )
    return Prepared(calls, work)


def _layer_call(
    operands: Operands, layer: GqaLayer, residual: F32, batch: AttentionBatch, kv: KVLayer
) -> Callable[[], object]:
    return partial(operands.ops.gqa_layer, layer, residual, residual, batch, kv)


def _layer(
    model: ModelSpec,
    spec: GqaSpec,
    weights: tuple[PackedWeight, ...],
    step: StepShape,
    operands: Operands,
) -> GqaLayer:
    """A layer of one copy of the weights, with its native view made."""
    qkv, output, *router = weights
    norm = operands.values(model.hidden_size)
    gate = None
    if model.moe is not None:
        num_experts = model.moe.gate.num_experts
        bias = operands.values(num_experts) if model.moe.has_correction_bias else None
        gate = Router(router[0], bias, model.moe.gate)
    layer = GqaLayer(
        frame=LayerFrame(norm, norm, model.norm_eps, gate),
        qkv=qkv,
        qkv_bias=None,
        output=output,
        output_bias=None,
        norm=_head_norm(spec, operands),
        rope=operands.rope(spec, step.context),
        num_heads=spec.num_heads,
        scale=spec.scale,
    )
    layer_view(layer)
    return layer


# -- latent attention ---------------------------------------------------------------------------


def rope(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """The rotary part of MLA's queries; where heads are whole, `rope_kv_write` rotates."""
    spec = model.attention
    if not isinstance(spec, MlaSpec):
        return

    def prepare(spec: MlaSpec, step: StepShape, operands: Operands) -> Prepared:
        x = operands.values(step.num_tokens, spec.num_heads, spec.qk_rope_head_dim)
        positions = np.arange(step.num_tokens, dtype=np.int32) % step.context
        call = partial(operands.ops.rope, x, operands.rope(spec, step.context), positions)
        return Prepared([call], Work(cache_bytes=2 * x.nbytes))

    for step in _short_steps(sizes):
        yield Case(
            "rope", _is_prefill(step), step.num_tokens, None, "",
            partial(prepare, spec, step),
            partial(torch_attention.rope, spec, step),
        )  # fmt: skip


def mla_kv_write(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """A step's latents, to blocks that no cache holds."""
    spec = model.attention
    if not isinstance(spec, MlaSpec):
        return

    def prepare(spec: MlaSpec, step: StepShape, operands: Operands) -> Prepared:
        kv, batches = operands.contexts(spec, step)
        latent = operands.values(step.num_tokens, spec.kv_lora_rank)
        k_rope = operands.values(step.num_tokens, spec.qk_rope_head_dim)
        write = partial(operands.ops.mla_kv_write, latent, k_rope)
        calls: Calls = [partial(write, batch, kv) for batch in batches]
        written = _kv_bytes(spec, step.num_tokens)
        return Prepared(calls, Work(memory_bytes=written, cache_bytes=2 * written))

    for step in _short_steps(sizes):
        yield Case(
            "mla_kv_write", _is_prefill(step), step.num_tokens, step.context, "",
            partial(prepare, spec, step),
        )  # fmt: skip


def mla_attention(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """All heads over one row per position."""
    spec = model.attention
    if not isinstance(spec, MlaSpec):
        return

    def prepare(spec: MlaSpec, step: StepShape, operands: Operands) -> Prepared:
        kv, batches = operands.contexts(spec, step)
        q_latent = operands.values(step.num_tokens, spec.num_heads, spec.kv_lora_rank)
        q_rope = operands.values(step.num_tokens, spec.num_heads, spec.qk_rope_head_dim)
        attend = partial(operands.ops.mla_attention, kv=kv, scale=spec.scale)
        calls: Calls = [partial(attend, q_latent, q_rope, batch) for batch in batches]
        per_position = 2 * (2 * spec.kv_lora_rank + spec.qk_rope_head_dim) * spec.num_heads
        work = Work(
            memory_bytes=_kv_bytes(spec, step.cached_tokens),
            cache_bytes=2 * q_latent.nbytes + q_rope.nbytes,
            operations=per_position * step.visible_positions,
            dtype=WeightDtype.BF16,
        )
        return Prepared(calls, work)

    for step in sizes.steps():
        yield Case(
            "mla_attention", _is_prefill(step), step.num_tokens, step.context, "bf16",
            partial(prepare, spec, step),
            partial(torch_attention.latent, spec, step),
        )  # fmt: skip
