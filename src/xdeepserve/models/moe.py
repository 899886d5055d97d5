"""Local execution of a layer's FFN: permute tokens by expert, run the experts, combine.

`permute_by_expert` is also what any other transport uses to sort rows for an `ExpertUnit`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xdeepserve.models.units import ExpertUnit, FfnUnit
from xdeepserve.ops import F32, I32


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


@dataclass(frozen=True, slots=True)
class Permutation:
    """Tokens sorted by expert; within an expert in order of token, then slot.

    Attributes:
        token_of_row: [R] int32.
        row_of_slot: [T, K] int32, -1 where the slot was skipped.
        num_tokens_per_expert: [E] int32, sums to R.
    """

    token_of_row: I32
    row_of_slot: I32
    num_tokens_per_expert: I32


def permute_by_expert(topk_ids: I32, num_experts: int) -> Permutation:
    """Sort the slots of topk_ids [T, K] (values in [0, num_experts), -1 = skip) by expert."""
    num_slots = topk_ids.shape[1]
    flat = topk_ids.ravel()
    order = np.argsort(flat, kind="stable")
    order = order[np.count_nonzero(flat < 0) :]
    row_of_slot = np.full(flat.size, -1, np.int32)
    row_of_slot[order] = np.arange(order.size, dtype=np.int32)
    counts = np.bincount(flat[order], minlength=num_experts).astype(np.int32)
    token_of_row = (order // num_slots).astype(np.int32)
    return Permutation(token_of_row, row_of_slot.reshape(topk_ids.shape), counts)


def run_experts(unit: ExpertUnit, hidden_states: F32, topk_ids: I32, topk_weights: F32) -> F32:
    """[T, H]: the routed part of an MoE layer; `unit` holds all its experts."""
    outputs, permutation = run_sorted(unit, hidden_states, topk_ids)
    return unit.ops.combine_topk(outputs, permutation.row_of_slot, topk_weights)


def run_sorted(unit: ExpertUnit, hidden_states: F32, topk_ids: I32) -> tuple[F32, Permutation]:
    """[R, H] outputs of the slots that are not skipped, and where each of them lies."""
    permutation = permute_by_expert(topk_ids, unit.num_experts)
    rows = hidden_states[permutation.token_of_row]
    return unit(rows, permutation.num_tokens_per_expert), permutation


def run_ffn(ffn: FfnUnit | None, experts: ExpertUnit | None, call: FfnCall) -> F32:
    """[T, H]: a layer's FFN output from local units; shared experts first, plus routed."""
    shared = None if ffn is None else ffn(call.hidden_states)
    if experts is None or call.topk_ids is None or call.topk_weights is None:
        assert shared is not None, "a layer has a dense FFN or experts"
        return shared
    routed = run_experts(experts, call.hidden_states, call.topk_ids, call.topk_weights)
    return routed if shared is None else shared + routed
