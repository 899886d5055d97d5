"""Choices of the reference backend: experts of a token, the next token, log probabilities."""

from __future__ import annotations

import numpy as np

from xdeepserve.ops.types import F32, I32, Array, GateSpec, SamplingBatch


def route(logits: F32, spec: GateSpec, bias: F32 | None) -> tuple[I32, F32]:
    """(expert ids [K], weights [K]) of one token; see `GateSpec`."""
    scores = _softmax(logits) if spec.scoring == "softmax" else _sigmoid(logits)
    choice = scores if bias is None else scores + bias
    if spec.num_groups > 1:
        choice = _keep_best_groups(choice, spec)
    ids = best(choice, spec.top_k)
    weights = scores[ids]
    if spec.renormalize:
        total = np.float32(0)
        for weight in weights:
            total += weight
        weights = weights / (total + np.float32(1e-20 if spec.scoring == "sigmoid" else 0))
    return ids, weights * np.float32(spec.scaling)


def sample_row(logits: F32, params: SamplingBatch, b: int) -> int:
    """The token of row b; see `Ops.sample`."""
    temperature, largest = params.temperature[b], logits.max()
    if temperature == 0 or not np.isfinite(largest):
        return int(np.argmax(logits))
    order = best(logits, int(params.top_k[b]) or logits.size)
    with np.errstate(over="ignore"):
        mass = np.exp((logits[order] - largest) / temperature).astype(np.float64)
    mass = _nucleus(mass, float(params.top_p[b]))
    mass = mass[mass >= params.min_p[b] * mass[0]]
    target = params.uniform[b] * mass.sum()
    index = int(np.searchsorted(np.cumsum(mass), target, side="right"))
    return int(order[min(index, mass.size - 1)])


def top_logprobs(logits: F32, token_ids: I32, num_top: int) -> tuple[F32, I32, F32]:
    """See `Ops.top_logprobs`."""
    size = logits.shape[0]
    chosen = np.empty(size, np.float32)
    ids = np.empty((size, num_top), np.int32)
    values = np.empty((size, num_top), np.float32)
    for b, row in enumerate(logits):
        wide = row.astype(np.float64)
        log_probs = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
        chosen[b] = log_probs[token_ids[b]]
        ids[b] = best(row, num_top)
        values[b] = log_probs[ids[b]]
    return chosen, ids, values


def best(values: Array, count: int) -> I32:
    """Ids of the `count` largest values, best first, ties by lower id."""
    order: I32 = np.argsort(-values, kind="stable")[:count].astype(np.int32)
    return order


def _nucleus(mass: Array, top_p: float) -> Array:
    """The shortest prefix that holds at least top_p of the mass; always one entry."""
    if top_p >= 1.0:
        return mass
    kept = int(np.searchsorted(np.cumsum(mass), top_p * mass.sum(), side="left")) + 1
    return mass[:kept]


def _keep_best_groups(choice: F32, spec: GateSpec) -> F32:
    groups = choice.reshape(spec.num_groups, -1)
    group_scores = np.sort(groups, axis=1)[:, -2:].sum(axis=1)
    kept = best(group_scores, spec.topk_groups)
    masked = np.full_like(groups, -np.inf)
    masked[kept] = groups[kept]
    return masked.reshape(-1)


def _softmax(logits: F32) -> F32:
    weights = np.exp(logits - logits.max())
    probabilities: F32 = weights / weights.sum()
    return probabilities


def _sigmoid(logits: F32) -> F32:
    with np.errstate(over="ignore"):
        return np.float32(1) / (np.float32(1) + np.exp(-logits))
