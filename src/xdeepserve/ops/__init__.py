"""Operator library: one contract, several backends. `get_ops` is the way in."""

from __future__ import annotations

from xdeepserve.ops.contract import Ops
from xdeepserve.ops.registry import get_ops
from xdeepserve.ops.types import (
    F32,
    I8,
    I32,
    Array,
    AttentionBatch,
    AttentionLayer,
    AttentionOutput,
    DecoderLayer,
    DecoderStack,
    GateSpec,
    GqaLayer,
    KVLayer,
    LayerFrame,
    MlaLayer,
    Mlp,
    PackedWeight,
    Penalties,
    QKNorm,
    Router,
    SamplingBatch,
    WeightDtype,
)

__all__ = [
    "F32",
    "I8",
    "I32",
    "Array",
    "AttentionBatch",
    "AttentionLayer",
    "AttentionOutput",
    "DecoderLayer",
    "DecoderStack",
    "GateSpec",
    "GqaLayer",
    "KVLayer",
    "LayerFrame",
    "MlaLayer",
    "Mlp",
    "Ops",
    "PackedWeight",
    "Penalties",
    "QKNorm",
    "Router",
    "SamplingBatch",
    "WeightDtype",
    "get_ops",
]
