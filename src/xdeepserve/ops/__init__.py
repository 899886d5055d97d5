"""Operator library: one contract, several backends. `get_ops` is the way in."""

from __future__ import annotations

from xdeepserve.ops.contract import (
    F32,
    I8,
    I32,
    Array,
    AttentionBatch,
    GateSpec,
    KVLayer,
    Ops,
    PackedWeight,
    QKNorm,
    SamplingBatch,
    WeightDtype,
)
from xdeepserve.ops.registry import get_ops

__all__ = [
    "F32",
    "I8",
    "I32",
    "Array",
    "AttentionBatch",
    "GateSpec",
    "KVLayer",
    "Ops",
    "PackedWeight",
    "QKNorm",
    "SamplingBatch",
    "WeightDtype",
    "get_ops",
]
