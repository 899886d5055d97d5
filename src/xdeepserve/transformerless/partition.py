"""partition(model): the model taken apart into the units of each role."""

from __future__ import annotations

from dataclasses import dataclass

from xdeepserve.models.decoder import Model
from xdeepserve.models.units import AttentionUnit, EmbeddingUnit, ExpertUnit, FfnUnit, HeadUnit


@dataclass(frozen=True, slots=True)
class AttentionSide:
    """What an attention worker holds; layers are indexed by layer_idx."""

    embedding: EmbeddingUnit
    layers: tuple[AttentionUnit, ...]
    head: HeadUnit


@dataclass(frozen=True, slots=True)
class Partition:
    """Units by role; the tuples have one entry per layer.

    Attributes:
        attention: embedding, attention units and LM head.
        ffn: dense MLP or shared experts; None where a layer has neither.
        experts: all routed experts of the layer; None on dense layers. A slice for one host is
            `unit.experts(start, stop)`.
    """

    attention: AttentionSide
    ffn: tuple[FfnUnit | None, ...]
    experts: tuple[ExpertUnit | None, ...]


def partition(model: Model) -> Partition:
    """Take the model apart. Shares its weights, copies nothing."""
    return Partition(
        attention=AttentionSide(
            embedding=model.embedding,
            layers=tuple(layer.attention for layer in model.layers),
            head=model.head,
        ),
        ffn=tuple(layer.ffn for layer in model.layers),
        experts=tuple(layer.experts for layer in model.layers),
    )
