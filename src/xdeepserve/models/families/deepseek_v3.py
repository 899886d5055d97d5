"""DeepSeek-V3 and R1 (arXiv:2412.19437); Kimi-K2 is the same architecture.

Latent attention, first layers dense, shared experts, sigmoid routing limited to groups.
"""

from __future__ import annotations

from xdeepserve.models.config_fields import ConfigFields
from xdeepserve.models.families.base import (
    Family,
    dense_first,
    has_mtp_layer,
    parse_decoder,
    parse_sigmoid_moe,
)
from xdeepserve.models.rope import parse_rope, rope_fields, yarn_mscale
from xdeepserve.models.spec import MAX_HEADS, MlaSpec, ModelSpec


def parse(fields: ConfigFields) -> ModelSpec:
    """ModelSpec of a DeepSeek-V3 or Kimi-K2 config.json."""
    return parse_decoder(
        fields,
        family="deepseek_v3",
        attention=_parse_mla(fields),
        moe=parse_sigmoid_moe(fields),
        moe_layers=dense_first(fields),
        has_mtp=has_mtp_layer(fields),
    )


def _parse_mla(fields: ConfigFields) -> MlaSpec:
    nope = fields.integer("qk_nope_head_dim", high=4096)
    rotary = fields.integer("qk_rope_head_dim", high=4096)
    rope = rope_fields(fields)
    has_q_lora = fields.has("q_lora_rank")
    return MlaSpec(
        num_heads=fields.integer("num_attention_heads", high=MAX_HEADS),
        q_lora_rank=fields.integer("q_lora_rank") if has_q_lora else None,
        kv_lora_rank=fields.integer("kv_lora_rank", high=1 << 16),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rotary,
        v_head_dim=fields.integer("v_head_dim", high=4096),
        rope=parse_rope(rope, rotary),
        rope_interleaved=fields.boolean("rope_interleave", True),
        bias=fields.boolean("attention_bias", False),
        scale=(nope + rotary) ** -0.5 * _score_mscale(rope) ** 2,
    )


def _score_mscale(rope: ConfigFields) -> float:
    """YaRN's mscale over all dimensions; squared because it applies to both q and k."""
    mscale_all_dim = rope.number("mscale_all_dim", 0.0, low=-1e-9, high=100.0)
    if rope.get("rope_type") == "default" or not mscale_all_dim:
        return 1.0
    return yarn_mscale(rope.number("factor", high=1e6), mscale_all_dim)


FAMILY = Family("deepseek_v3", ("deepseek_v3", "kimi_k2"), parse)
