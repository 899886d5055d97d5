"""The cases of the operators around experts; every call chooses others, all equally likely.

A function per operator of `Ops`, by its name; it yields the cases of one model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import prod

import numpy as np
from benchmarks.operators import torch_cases
from benchmarks.operators.case import Calls, Case, Prepared, Sizes
from benchmarks.operators.operands import Operands, WeightPart, expert_choices
from benchmarks.operators.roofline import Work
from benchmarks.operators.weights import experts_of

from xdeepserve.models.spec import ModelSpec
from xdeepserve.ops import F32, I32, GateSpec, PackedWeight
from xdeepserve.ops.composed import permute_by_expert
from xdeepserve.ops.cpu_views import weight_view


def gate_topk(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """The model's own gate."""
    if model.moe is None:
        return
    gate, has_bias = model.moe.gate, model.moe.has_correction_bias

    def prepare(tokens: int, operands: Operands) -> Prepared:
        logits = operands.values(tokens, gate.num_experts)
        bias = operands.values(gate.num_experts) if has_bias else None
        call = partial(operands.ops.gate_topk, logits, gate, bias)
        return Prepared([call], Work(cache_bytes=logits.nbytes + 8 * tokens * gate.top_k))

    for tokens in sizes.tokens:
        peer = partial(torch_cases.gate_topk, gate, tokens)
        yield Case("gate_topk", gate.scoring, tokens, None, "", partial(prepare, tokens), peer)


def _expert_work(weights: tuple[PackedWeight, ...], choices: list[I32]) -> Work:
    """Experts that no token chose are not read: the mean of the choices."""
    active = float(np.mean([np.unique(ids).size for ids in choices]))
    num_experts, (tokens, top_k) = weights[0].shape[0], choices[0].shape
    values = sum(prod(weight.shape[1:]) for weight in weights)
    return Work(
        memory_bytes=active / num_experts * sum(weight.data.nbytes for weight in weights),
        cache_bytes=8 * tokens * top_k * weights[0].shape[2],
        operations=2 * tokens * top_k * values,
        dtype=weights[0].dtype,
    )


def expert_mlp(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """Rows that are sorted by expert."""

    def prepare(
        gate: GateSpec, parts: list[WeightPart], tokens: int, operands: Operands
    ) -> Prepared:
        sets, choices = operands.weights(*parts), expert_choices(gate, tokens)
        x = operands.values(choices[0].size, model.hidden_size)
        num_experts = parts[0].shape[0]
        counts = [permute_by_expert(ids, num_experts).num_tokens_per_expert for ids in choices]
        calls: Calls = [
            partial(operands.ops.expert_mlp, x, count, gate_up, down)
            for count in counts
            for gate_up, down in sets
        ]
        return Prepared(calls, _expert_work(sets[0], choices))

    yield from _expert_cases("expert_mlp", prepare, torch_cases.expert_mlp, model, sizes)


def routed_experts(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """Sorting, experts and the weighted sum."""

    def prepare(
        gate: GateSpec, parts: list[WeightPart], tokens: int, operands: Operands
    ) -> Prepared:
        sets, choices = operands.weights(*parts), expert_choices(gate, tokens)
        for weights in sets:  # a model makes these views once
            for weight in weights:
                weight_view(weight)
        x, shares = operands.values(tokens, model.hidden_size), _shares(choices[0])
        calls: Calls = [
            partial(operands.ops.routed_experts, x, ids, shares, gate_up, down)
            for ids in choices
            for gate_up, down in sets
        ]
        return Prepared(calls, _expert_work(sets[0], choices))

    yield from _expert_cases("routed_experts", prepare, torch_cases.routed_experts, model, sizes)


def _shares(ids: I32) -> F32:
    return np.full(ids.shape, 1 / ids.shape[1], np.float32)


def _expert_cases(
    operator: str,
    prepare: Callable[[GateSpec, list[WeightPart], int, Operands], Prepared],
    peer: torch_cases.ExpertPeer,
    model: ModelSpec,
    sizes: Sizes,
) -> Iterator[Case]:
    if model.moe is None:
        return
    gate = model.moe.gate
    for dtype in sizes.dtypes:
        parts = [WeightPart(shape, dtype) for shape in experts_of(model)]
        for tokens in sizes.tokens:
            yield Case(
                operator, "", tokens, None, str(dtype),
                partial(prepare, gate, parts, tokens),
                partial(peer, gate, parts, tokens),
            )  # fmt: skip


def combine_topk(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """Outputs of experts, added up for each token."""
    if model.moe is None:
        return
    top_k, width = model.moe.gate.top_k, model.hidden_size

    def prepare(tokens: int, operands: Operands) -> Prepared:
        rows = operands.values(tokens * top_k, width)
        order = operands.rng.permutation(tokens * top_k).astype(np.int32).reshape(tokens, top_k)
        call = partial(operands.ops.combine_topk, rows, order, _shares(order))
        return Prepared([call], Work(cache_bytes=rows.nbytes + 4 * tokens * width))

    for tokens in sizes.tokens:
        peer = partial(torch_cases.combine_topk, top_k, width, tokens)
        yield Case("combine_topk", f"top {top_k}", tokens, None, "", partial(prepare, tokens), peer)
