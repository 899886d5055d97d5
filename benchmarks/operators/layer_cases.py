"""The cases of fused operators: the attention side of a layer, and a whole layer as a stack of one.

Attention's weights are bf16 here, also where they are served as w8a8g64 or w8a16, whose products
`linear` measures; those of FFN and experts have the precision of the case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import prod

import numpy as np
from benchmarks.operators.attention_cases import attention_work, head_norm, is_prefill
from benchmarks.operators.case import Calls, Case, Prepared, Sizes
from benchmarks.operators.operands import Operands, StepShape, WeightPart
from benchmarks.operators.roofline import Work
from benchmarks.operators.weights import experts_of, grouped_weights, linear_weights, mlp_sites

from xdeepserve.models.build_attention import LATENT_NORM_EPS
from xdeepserve.models.spec import GqaSpec, MlaSpec, ModelSpec
from xdeepserve.ops import (
    F32,
    AttentionBatch,
    AttentionLayer,
    AttentionOutput,
    DecoderLayer,
    DecoderStack,
    GqaLayer,
    KVLayer,
    LayerFrame,
    MlaLayer,
    Mlp,
    PackedWeight,
    Router,
    WeightDtype,
    composed,
)
from xdeepserve.ops.cpu_views import cache_view, layer_view, stack_view

Named = dict[str, PackedWeight]
Parts = dict[str, WeightPart]


def gqa_layer(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """Everything of a layer before its FFN, with grouped-query attention."""
    if isinstance(model.attention, GqaSpec):
        yield from _attention_cases("gqa_layer", model, sizes)


def mla_layer(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """The same with latent attention."""
    if isinstance(model.attention, MlaSpec):
        yield from _attention_cases("mla_layer", model, sizes)


def _attention_cases(operator: str, model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    for step in sizes.steps():
        yield Case(
            operator, is_prefill(step), step.num_tokens, step.context, "bf16",
            partial(_prepare_attention, model, step),
        )  # fmt: skip


def decoder_layers(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """One layer, FFN and experts included; the last one of the model, which has experts if any."""
    for dtype in sizes.dtypes:
        for step in sizes.steps():
            yield Case(
                "decoder_layers", is_prefill(step), step.num_tokens, step.context, str(dtype),
                partial(_prepare_stack, model, dtype, step),
            )  # fmt: skip


def _attention_parts(model: ModelSpec) -> Parts:
    parts = {name: WeightPart(shape, WeightDtype.BF16) for name, shape in linear_weights(model)}
    if "router" in parts:
        parts["router"] = WeightPart(parts["router"].shape, WeightDtype.FLOAT32)
    absorbed = {name: WeightPart(shape, WeightDtype.BF16) for name, shape in grouped_weights(model)}
    return parts | absorbed


def _ffn_parts(model: ModelSpec, dtype: WeightDtype) -> Parts:
    names = [("ffn", shapes) for site, shapes in mlp_sites(model) if _is_last(model, site)]
    if model.moe is not None:
        names.append(("experts", experts_of(model)))
    return {
        f"{name}.{part}": WeightPart(shape, dtype)
        for name, shapes in names
        for part, shape in zip(("gate_up", "down"), shapes, strict=True)
    }


def _is_last(model: ModelSpec, site: str) -> bool:
    return site == ("dense" if model.moe is None else "shared")


def _named_sets(operands: Operands, parts: Parts) -> list[Named]:
    sets = operands.weights(*parts.values())
    return [dict(zip(parts, weights, strict=True)) for weights in sets]


def _prepare_attention(model: ModelSpec, step: StepShape, operands: Operands) -> Prepared:
    kv, batches = operands.contexts(model.attention, step)
    cache_view(kv)
    sets = _named_sets(operands, _attention_parts(model))
    layers = [_layer(model, named, step, operands) for named in sets]
    for layer in layers:
        layer_view(layer)
    residual = operands.values(step.num_tokens, model.hidden_size)
    calls: Calls = [
        _attend(operands, layers[i % len(layers)], residual, batches[i % len(batches)], kv)
        for i in range(max(len(layers), len(batches)))
    ]
    return Prepared(calls, _layer_work(model, step, sets[0], 4 * residual.nbytes))


def _attend(
    operands: Operands, layer: AttentionLayer, residual: F32, batch: AttentionBatch, kv: KVLayer
) -> Callable[[], AttentionOutput]:
    return partial(composed.attention_layer, operands.ops, layer, residual, residual, batch, kv)


def _prepare_stack(
    model: ModelSpec, dtype: WeightDtype, step: StepShape, operands: Operands
) -> Prepared:
    kv, batches = operands.contexts(model.attention, step)
    cache_view(kv)
    attention = _attention_parts(model)
    sets = _named_sets(operands, attention | _ffn_parts(model, dtype))
    stacks = [_stack(model, named, step, operands) for named in sets]
    for stack in stacks:
        stack_view(stack)
    hidden = operands.values(step.num_tokens, model.hidden_size)
    calls: Calls = [
        partial(
            operands.ops.decoder_layers,
            stacks[i % len(stacks)], hidden, batches[i % len(batches)], [kv],
        )
        for i in range(max(len(stacks), len(batches)))
    ]  # fmt: skip
    chosen = _attend(operands, stacks[0].layers[0].attention, hidden, batches[0], kv)()
    plain = {name: weight for name, weight in sets[0].items() if name in attention}
    work = _layer_work(model, step, plain, 2 * hidden.nbytes)
    return Prepared(calls, _with_ffn(work, sets[0], dtype, chosen))


def _layer_work(model: ModelSpec, step: StepShape, named: Named, cache_bytes: float) -> Work:
    attention = attention_work(model.attention, step)
    products = 2 * step.num_tokens * sum(prod(weight.shape) for weight in named.values())
    weight_bytes = sum(weight.data.nbytes for weight in named.values())
    return Work(
        memory_bytes=attention.memory_bytes + weight_bytes,
        cache_bytes=cache_bytes,
        operations=attention.operations + products,
        dtype=WeightDtype.BF16,
    )


def _with_ffn(work: Work, named: Named, dtype: WeightDtype, chosen: AttentionOutput) -> Work:
    """Experts that no token chose are not read. All products count at the precision of the FFN."""
    num_tokens, memory_bytes, operations = len(chosen.residual), 0.0, 0.0
    for name, weight in named.items():
        if name.startswith("ffn."):
            memory_bytes += weight.data.nbytes
            operations += 2 * num_tokens * prod(weight.shape)
        elif name.startswith("experts."):
            assert chosen.topk_ids is not None, "experts come with a router"
            active = np.unique(chosen.topk_ids).size / weight.shape[0]
            memory_bytes += active * weight.data.nbytes
            operations += 2 * chosen.topk_ids.size * prod(weight.shape[1:])
    return Work(
        memory_bytes=work.memory_bytes + memory_bytes,
        cache_bytes=work.cache_bytes,
        operations=work.operations + operations,
        dtype=dtype,
    )


def _stack(model: ModelSpec, named: Named, step: StepShape, operands: Operands) -> DecoderStack:
    def mlp(name: str) -> Mlp | None:
        if f"{name}.gate_up" not in named:
            return None
        return Mlp(named[f"{name}.gate_up"], named[f"{name}.down"])

    attention = _layer(model, named, step, operands)
    return DecoderStack((DecoderLayer(attention, mlp("ffn"), mlp("experts")),))


def _layer(model: ModelSpec, named: Named, step: StepShape, operands: Operands) -> AttentionLayer:
    """The attention side of a layer, of one copy of the weights."""
    spec, norm = model.attention, operands.values(model.hidden_size)
    frame = LayerFrame(norm, norm, model.norm_eps, _router(model, named, operands))
    rope = operands.rope(spec, step.context)
    if isinstance(spec, GqaSpec):
        return GqaLayer(
            frame=frame,
            qkv=named["qkv"],
            qkv_bias=None,
            output=named["output"],
            output_bias=None,
            norm=head_norm(spec, operands),
            rope=rope,
            num_heads=spec.num_heads,
            scale=spec.scale,
        )
    rank = spec.q_lora_rank
    return MlaLayer(
        frame=frame,
        latents=named["latents"],
        latents_bias=None,
        query=named.get("query"),
        query_norm=None if rank is None else operands.values(rank),
        latent_norm=operands.values(spec.kv_lora_rank),
        norm_eps=LATENT_NORM_EPS,
        key_absorb=named["key_absorb"],
        value_absorb=named["value_absorb"],
        output=named["output"],
        output_bias=None,
        rope=rope,
        scale=spec.scale,
    )


def _router(model: ModelSpec, named: Named, operands: Operands) -> Router | None:
    if model.moe is None:
        return None
    gate = model.moe.gate
    bias = operands.values(gate.num_experts) if model.moe.has_correction_bias else None
    return Router(named["router"], bias, gate)
