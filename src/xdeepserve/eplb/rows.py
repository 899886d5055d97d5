"""Array primitives of expert placement: many independent rows solved at once.

A row is one layer on one node (or one layer, where nodes do not matter): E experts with loads, R
ranks with S slots each. An expert with c replicas puts load / c on each rank that holds one. Rows
advance together, so a placement of all layers costs a few hundred array operations.

    replicate -> counts [B, E]      how many replicas: the hottest share is split again
    trim      -> slots  [B, R, S]   take surplus replicas off, from the fullest rank first
    fill      -> slots  [B, R, S]   largest share first onto the least loaded rank with room

An empty slot holds the id E, whose share is zero.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Bool = NDArray[np.bool_]


def replicate(
    load: F64, num_replicas: int, *, max_per_expert: int | None = None
) -> tuple[I64, I64]:
    """Split the expert with the largest share again and again: minimises the largest share.

    Args:
        load: [B, E].
        num_replicas: replicas of a row, at least E.
        max_per_expert: limit per expert; with it a row may end below num_replicas.

    Returns:
        counts [B, E] and the expert of each replica [B, num_replicas], first one of each (-1 where
        the limit left none to add).
    """
    num_rows, num_experts = load.shape
    rows = np.arange(num_rows)
    counts = np.ones((num_rows, num_experts), np.int64)
    expert_of = np.full((num_rows, num_replicas), -1, np.int64)
    expert_of[:, :num_experts] = np.arange(num_experts)
    limit = num_replicas if max_per_expert is None else max_per_expert
    share = load.copy() if limit > 1 else np.full_like(load, -1.0)
    for idx in range(num_experts, num_replicas):
        hottest = np.argmax(share, axis=1)
        can = share[rows, hottest] >= 0
        counts[rows, hottest] += can
        expert_of[can, idx] = hottest[can]
        new = counts[rows, hottest]
        share[rows, hottest] = np.where(new < limit, load[rows, hottest] / new, -1.0)
    return counts, expert_of


def count_replicas(slots: I64, num_experts: int) -> I64:
    """[B, E] replicas of each expert in slots [B, R, S]."""
    counts = np.zeros((slots.shape[0], num_experts + 1), np.int64)
    np.add.at(counts, (np.arange(slots.shape[0])[:, None, None], slots), 1)
    return counts[:, :-1]


def shares(load: F64, counts: I64) -> F64:
    """[B, E + 1] load per replica; the last column, of empty slots, is zero."""
    share = np.zeros((load.shape[0], load.shape[1] + 1))
    np.divide(load, counts, out=share[:, :-1], where=counts > 0)
    return share


def slot_shares(slots: I64, share: F64) -> F64:
    """[B, R, S] load in each slot."""
    loads: F64 = share[np.arange(slots.shape[0])[:, None, None], slots]
    return loads


def rank_loads(slots: I64, load: F64) -> F64:
    """[B, R] load of each rank when the replicas of an expert share its load evenly."""
    share = shares(load, count_replicas(slots, load.shape[1]))
    total: F64 = slot_shares(slots, share).sum(axis=2)
    return total


def held_by_rank(slots: I64, num_experts: int) -> Bool:
    """[B, R, E + 1] whether a rank holds an expert; False for the empty one."""
    held = np.zeros((*slots.shape[:2], num_experts + 1), np.bool_)
    np.put_along_axis(held, slots, True, axis=2)
    held[:, :, -1] = False
    return held


def trim(slots: I64, counts: I64, share: F64) -> I64:
    """Slots without what exceeds `counts`: doubles on a rank go first, then the fullest ranks'."""
    num_rows, num_experts = counts.shape
    flat = slots.reshape(num_rows, -1)
    cost = np.repeat(slot_shares(slots, share).sum(axis=2), slots.shape[2], axis=1)
    cost[_doubled(slots).reshape(num_rows, -1)] = np.inf
    order = np.lexsort((cost, flat), axis=1)  # by expert, cheapest first
    experts = np.take_along_axis(flat, order, 1)
    present = count_replicas(slots, num_experts)
    first = np.pad(np.cumsum(present, axis=1) - present, ((0, 0), (0, 1)))
    nth = np.arange(flat.shape[1]) - np.take_along_axis(first, experts, 1)
    surplus = nth >= np.take_along_axis(np.pad(counts, ((0, 0), (0, 1))), experts, 1)
    surplus |= np.isinf(np.take_along_axis(cost, order, 1))
    kept = flat.copy()
    np.put_along_axis(kept, order, np.where(surplus, num_experts, experts), 1)
    return kept.reshape(slots.shape)


def _doubled(slots: I64) -> Bool:
    """[B, R, S] whether the rank holds the same expert in an earlier slot too."""
    order = np.argsort(slots, axis=2, kind="stable")
    experts = np.take_along_axis(slots, order, 2)
    again = np.zeros(slots.shape, np.bool_)
    np.put_along_axis(again, order[:, :, 1:], experts[:, :, 1:] == experts[:, :, :-1], axis=2)
    return again


def _missing(slots: I64, counts: I64, share: F64) -> tuple[I64, I64, I64]:
    """Replicas still to place as (row, expert, nth of its row), largest share first in a row."""
    num_rows, num_experts = counts.shape
    absent = np.maximum(counts - count_replicas(slots, num_experts), 0)
    order = np.argsort(-share[:, :-1], axis=1, kind="stable")
    times = np.take_along_axis(absent, order, 1)
    row = np.repeat(np.arange(num_rows), absent.sum(axis=1))
    expert = np.repeat(order.ravel(), times.ravel())
    total = absent.sum(axis=1)
    nth = np.arange(row.size) - np.repeat(np.cumsum(total) - total, total)
    return row, expert, nth


def fill(slots: I64, counts: I64, share: F64) -> I64:
    """Place the replicas missing from `slots`: each on the least loaded rank with a free slot.

    No rank gets an expert twice; a replica that finds no such rank stays unplaced, if another
    replica of its expert is placed.

    Args:
        slots: [B, R, S]; what is there stays.
        counts: [B, E] replicas wanted.
        share: [B, E + 1] load per replica under `counts`.
    """
    num_experts = counts.shape[1]
    slots = slots.copy()
    load = slot_shares(slots, share).sum(axis=2)
    held = held_by_rank(slots, num_experts)
    free = np.count_nonzero(slots == num_experts, axis=2)
    row, expert, nth = _missing(slots, counts, share)
    by_turn = np.argsort(nth, kind="stable")
    turns = np.split(by_turn, np.cumsum(np.bincount(nth))[:-1]) if nth.size else []
    for turn in turns:
        b, e = row[turn], expert[turn]
        cost = np.where((free[b] > 0) & ~held[b, :, e], load[b], np.inf)
        rank = np.argmin(cost, axis=1)
        fits = np.isfinite(cost[np.arange(b.size), rank])
        b, e, rank = b[fits], e[fits], rank[fits]
        slot = np.argmax(slots[b, rank] == num_experts, axis=1)
        slots[b, rank, slot] = e
        load[b, rank] += share[b, e]
        held[b, rank, e] = True
        free[b, rank] -= 1
    return slots
