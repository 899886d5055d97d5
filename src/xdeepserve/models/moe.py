"""What a layer asks of its FFN, and experts on the slots of an exchange."""

from __future__ import annotations

from dataclasses import dataclass

from xdeepserve.models.units import ExpertUnit
from xdeepserve.ops import F32, I32
from xdeepserve.ops.composed import Permutation, permute_by_expert


@dataclass(frozen=True, slots=True)
class FfnCall:
    """What a layer asks of its FFN: one hand-over from attention to FFN and experts.

    Attributes:
        layer_idx: the layer.
        hidden_states: [T, H] normed.
        topk_ids: [T, K] logical experts, -1 = skip; None on a dense layer.
        topk_weights: [T, K]; None on a dense layer.
    """

    layer_idx: int
    hidden_states: F32
    topk_ids: I32 | None
    topk_weights: F32 | None


def run_sorted(unit: ExpertUnit, hidden_states: F32, topk_ids: I32) -> tuple[F32, Permutation]:
    """[R, H] outputs of the slots that are not skipped, and where each of them lies."""
    permutation = permute_by_expert(topk_ids, unit.num_experts)
    rows = hidden_states[permutation.token_of_row]
    return unit(rows, permutation.num_tokens_per_expert), permutation
