"""partition(model): the model taken apart into the units of each role."""

from __future__ import annotations

from dataclasses import dataclass

from xdeepserve.models.decoder import AttentionSide, Model
from xdeepserve.models.units import ExpertUnit, FfnUnit


@dataclass(frozen=True, slots=True)
class Partition:
    """Units by role; the tuples have one entry per layer.

    Attributes:
        attention: embedding, attention units and LM head.
        ffn: dense MLP or shared experts; None where a layer has neither.
        experts: all routed experts of the layer; None on dense layers.
    """

    attention: AttentionSide
    ffn: tuple[FfnUnit | None, ...]
    experts: tuple[ExpertUnit | None, ...]


def partition(model: Model) -> Partition:
    """Take the model apart. Shares its weights, copies nothing."""
    return Partition(
        attention=model.attention_side,
        ffn=tuple(layer.ffn for layer in model.layers),
        experts=tuple(layer.experts for layer in model.layers),
    )
