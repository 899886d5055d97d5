"""Mixtral: every layer routes by softmax over its top-k; experts are named w1, w3, w2."""

from __future__ import annotations

from xdeepserve.models.config_fields import ConfigFields
from xdeepserve.models.families.base import (
    Family,
    num_layers,
    parse_decoder,
    parse_gqa,
    refuse_sliding_window,
)
from xdeepserve.models.spec import MAX_EXPERTS, ModelSpec, MoeSpec
from xdeepserve.ops import GateSpec


def parse(fields: ConfigFields) -> ModelSpec:
    """ModelSpec of a Mixtral config.json."""
    refuse_sliding_window(fields, on_by_default=True)
    num_experts = fields.integer("num_local_experts", high=MAX_EXPERTS)
    gate = GateSpec(
        num_experts=num_experts,
        top_k=fields.integer("num_experts_per_tok", high=num_experts),
        scoring="softmax",
        renormalize=True,
    )
    return parse_decoder(
        fields,
        family="mixtral",
        attention=parse_gqa(fields, default_theta=1e6),
        moe=MoeSpec(gate=gate, intermediate_size=fields.integer("intermediate_size")),
        moe_layers=(True,) * num_layers(fields),
    )


FAMILY = Family(
    "mixtral", ("mixtral",), parse, moe_block="block_sparse_moe", expert_parts=("w1", "w3", "w2")
)
