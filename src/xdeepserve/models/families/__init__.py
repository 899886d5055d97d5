"""Model families: config.json of a family -> ModelSpec, and how its tensors are named."""

from __future__ import annotations

from typing import Any

from xdeepserve.models.config_fields import ConfigFields
from xdeepserve.models.families import (
    deepseek_v3,
    glm4_moe,
    llama,
    mixtral,
    qwen2,
    qwen3,
    qwen3_moe,
)
from xdeepserve.models.families.base import Family, without_absent_mtp
from xdeepserve.models.spec import ModelSpec

_FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    qwen3_moe.FAMILY,
    mixtral.FAMILY,
    deepseek_v3.FAMILY,
    glm4_moe.FAMILY,
)
_BY_MODEL_TYPE = {model_type: family for family in _FAMILIES for model_type in family.model_types}
_BY_NAME = {family.name: family for family in _FAMILIES}


def parse_spec(config: dict[str, Any]) -> ModelSpec:
    """The architecture that an untrusted config.json describes.

    Raises:
        ModelFormatError: unknown `model_type`, or a field that is missing, ill-typed, out of range
            or asks for something unsupported; the message names the field and its value.
    """
    fields = ConfigFields(config)
    model_type = fields.choice("model_type", tuple(_BY_MODEL_TYPE))
    return _BY_MODEL_TYPE[model_type].parse(fields)


def family_of(spec: ModelSpec) -> Family:
    """The family that made `spec`."""
    return _BY_NAME[spec.family]


__all__ = ["Family", "family_of", "parse_spec", "without_absent_mtp"]
