"""Qwen3 MoE: softmax router, no shared experts, dense layers by step or by list."""

from __future__ import annotations

from xdeepserve.models.config_fields import ConfigFields
from xdeepserve.models.families.base import (
    Family,
    num_layers,
    parse_decoder,
    parse_gqa,
    refuse_sliding_window,
)
from xdeepserve.models.spec import MAX_EXPERTS, MAX_LAYERS, ModelSpec, MoeSpec
from xdeepserve.ops import GateSpec


def parse(fields: ConfigFields) -> ModelSpec:
    """ModelSpec of a Qwen3-MoE config.json."""
    refuse_sliding_window(fields)
    bias = fields.boolean("attention_bias", False)
    attention = parse_gqa(fields, qkv_bias=bias, output_bias=bias, qk_norm=True)
    # transformers 5 writes num_local_experts where version 4 wrote num_experts
    experts_field = "num_experts" if fields.has("num_experts") else "num_local_experts"
    num_experts = fields.integer(experts_field, high=MAX_EXPERTS)
    gate = GateSpec(
        num_experts=num_experts,
        top_k=fields.integer("num_experts_per_tok", high=num_experts),
        scoring="softmax",
        renormalize=fields.boolean("norm_topk_prob", False),
    )
    return parse_decoder(
        fields,
        family="qwen3_moe",
        attention=attention,
        moe=MoeSpec(gate=gate, intermediate_size=fields.integer("moe_intermediate_size")),
        moe_layers=_moe_layers(fields),
    )


def _moe_layers(fields: ConfigFields) -> tuple[bool, ...]:
    layers = num_layers(fields)
    step = fields.integer("decoder_sparse_step", 1, high=MAX_LAYERS)
    dense = frozenset(fields.integers("mlp_only_layers", high=layers))
    return tuple(idx not in dense and (idx + 1) % step == 0 for idx in range(layers))


FAMILY = Family("qwen3_moe", ("qwen3_moe",), parse)
