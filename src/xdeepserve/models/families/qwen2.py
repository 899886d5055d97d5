"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

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
    """ModelSpec of a Qwen2 config.json."""
    refuse_sliding_window(fields)
    return parse_decoder(fields, family="qwen2", attention=parse_gqa(fields, qkv_bias=True))


FAMILY = Family("qwen2", ("qwen2",), parse)
