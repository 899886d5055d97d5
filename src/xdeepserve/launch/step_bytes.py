"""What a decode step has to read at least: weights and KV cache, each byte once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from xdeepserve.models.decoder import Model
from xdeepserve.ops import PackedWeight


def read_bytes(model: Model, *, batch: int, context: int) -> int:
    """Bytes of one decode step; not counted are activations, norms and the embedding's rows.

    Args:
        batch: sequences; of experts, as many are counted as they choose if all are equally likely.
        context: tokens of each sequence.
    """
    total = model.head.lm_head.data.nbytes + batch * context * model.kv_format.bytes_per_token
    for layer in model.stack.layers:
        total += _size(layer.attention) + _size(layer.ffn)
        total += round(_share_chosen(model, batch) * _size(layer.experts))
    return total


def _size(node: Any) -> int:
    return sum(weight.data.nbytes for weight in _weights(node))


def _share_chosen(model: Model, batch: int) -> float:
    """Expected share of a layer's experts that at least one of the sequences chooses."""
    if model.spec.moe is None:
        return 0.0
    gate = model.spec.moe.gate
    return 1.0 - (1.0 - gate.top_k / gate.num_experts) ** batch


def _weights(node: Any) -> Iterator[PackedWeight]:
    """All packed weights inside a dataclass."""
    if isinstance(node, PackedWeight):
        yield node
    elif is_dataclass(node):
        for field in fields(node):
            yield from _weights(getattr(node, field.name))
