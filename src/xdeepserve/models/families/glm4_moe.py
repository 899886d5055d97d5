"""GLM-4.5 family: grouped-query attention with partial rotation, DeepSeek-V3 style experts."""

from __future__ import annotations

from xdeepserve.models.config_fields import ConfigFields
from xdeepserve.models.families.base import (
    Family,
    dense_first,
    has_mtp_layer,
    parse_decoder,
    parse_gqa,
    parse_sigmoid_moe,
)
from xdeepserve.models.spec import ModelSpec


def parse(fields: ConfigFields) -> ModelSpec:
    """ModelSpec of a GLM-4.5 config.json."""
    attention = parse_gqa(
        fields,
        qkv_bias=fields.boolean("attention_bias", False),
        qk_norm=fields.boolean("use_qk_norm", False),
        partial_rotary=0.5,
    )
    return parse_decoder(
        fields,
        family="glm4_moe",
        attention=attention,
        moe=parse_sigmoid_moe(fields, groups=1),
        moe_layers=dense_first(fields),
        has_mtp=has_mtp_layer(fields),
    )


FAMILY = Family("glm4_moe", ("glm4_moe",), parse)
