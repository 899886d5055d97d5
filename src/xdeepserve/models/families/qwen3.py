"""Qwen3 (dense): per-head norm of q and k, head_dim 128 unless configured."""

from __future__ import annotations

from xdeepserve.models.config_fields import ConfigFields
from xdeepserve.models.families.base import (
    Family,
    parse_decoder,
    parse_gqa,
    refuse_sliding_window,
)
from xdeepserve.models.spec import ModelSpec


def parse(fields: ConfigFields) -> ModelSpec:
    """ModelSpec of a Qwen3 config.json."""
    refuse_sliding_window(fields)
    bias = fields.boolean("attention_bias", False)
    attention = parse_gqa(fields, head_dim=128, qkv_bias=bias, output_bias=bias, qk_norm=True)
    return parse_decoder(fields, family="qwen3", attention=attention)


FAMILY = Family("qwen3", ("qwen3",), parse)
