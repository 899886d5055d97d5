"""Llama family: SmolLM2, Llama 2 and 3. Rope scaling by the `llama3` rule where configured."""

from __future__ import annotations

from xdeepserve.models.config_fields import ConfigFields
from xdeepserve.models.families.base import Family, parse_decoder, parse_gqa
from xdeepserve.models.spec import ModelSpec


def parse(fields: ConfigFields) -> ModelSpec:
    """ModelSpec of a Llama config.json."""
    if fields.boolean("mlp_bias", False):
        raise fields.error("mlp_bias", "is not supported")
    bias = fields.boolean("attention_bias", False)
    attention = parse_gqa(fields, qkv_bias=bias, output_bias=bias)
    return parse_decoder(fields, family="llama", attention=attention)


FAMILY = Family("llama", ("llama",), parse)
