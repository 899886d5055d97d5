"""Bounded local search on placements: every accepted change lowers the load of a fullest rank.

Two kinds of change, for all rows at once: *swap* an expert of the fullest rank with a lighter one
(or an empty slot) elsewhere; and where no swap helps, *split* one of its experts once more, in an
empty slot or in place of a redundant replica. A change counts only if every rank it touches ends
below the old peak; so the search cannot cycle, and its result is never worse than its start.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xdeepserve.eplb.rows import (
    F64,
    I64,
    Bool,
    count_replicas,
    held_by_rank,
    shares,
    slot_shares,
)

_MIN_STEP = 1e-9
"""Smallest gain that counts, as a fraction of the peak: below it, rounding decides."""
_NUM_SPLIT = 2
"""Experts of the fullest rank considered for a split: its largest."""
_NUM_DONORS = 24
"""Redundant slots considered as the place of a split: those whose loss costs least."""


@dataclass(slots=True)
class _State:
    """Rows still in search, and what follows from their slots.

    Attributes:
        slots: [B, R, S].
        load: [B, E + 1], the last column zero, as in `share`.
        counts: [B, E + 1] replicas; as many as slots for the empty one, which can always go.
        share: [B, E + 1] load per replica.
        value: [B, R, S] load in each slot.
        rank_load: [B, R].
        peak_rank, peak: [B] the fullest rank and its load.
        mine, mine_value: [B, S] slots of the fullest rank and their load.
    """

    slots: I64
    load: F64
    counts: I64
    share: F64
    value: F64
    rank_load: F64
    peak_rank: I64
    peak: F64
    mine: I64
    mine_value: F64

    @classmethod
    def of(cls, slots: I64, load: F64) -> _State:
        counts = count_replicas(slots, load.shape[1])
        share = shares(load, counts)
        value = slot_shares(slots, share)
        rank_load = value.sum(axis=2)
        peak_rank = np.argmax(rank_load, axis=1)
        rows = np.arange(len(slots))
        return cls(
            slots=slots,
            load=np.pad(load, ((0, 0), (0, 1))),
            counts=np.pad(counts, ((0, 0), (0, 1)), constant_values=slots[0].size),
            share=share,
            value=value,
            rank_load=rank_load,
            peak_rank=peak_rank,
            peak=rank_load[rows, peak_rank],
            mine=slots[rows, peak_rank],
            mine_value=value[rows, peak_rank],
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.load.shape[1]) - 1

    @property
    def rows(self) -> I64:
        """[B] 0 .. B - 1, to index with."""
        return np.arange(len(self.slots))


def improve(slots: I64, load: F64, *, goal: F64, num_replicas: int, max_rounds: int) -> I64:
    """Lower the peak of each row until it reaches its goal or nothing helps.

    Args:
        slots: [B, R, S] expert ids, E = empty; every expert has a replica.
        load: [B, E].
        goal: [B] peak that is good enough.
        num_replicas: most replicas of a row; slots beyond it stay empty.
        max_rounds: bound on the changes of a row.

    Returns:
        New slots [B, R, S].
    """
    result = slots.copy()
    active = np.arange(slots.shape[0])
    for _ in range(max_rounds):
        state = _State.of(result[active], load[active])
        behind = state.peak > goal[active]
        if not behind.any():
            break
        if not behind.all():
            active = active[behind]
            state = _State.of(result[active], load[active])
        changed = _swap(state)
        stuck = np.nonzero(~changed)[0]
        if stuck.size:
            part = _State.of(state.slots[stuck], load[active[stuck]])
            changed[stuck] = _split(part, num_replicas)
            state.slots[stuck] = part.slots
        result[active] = state.slots
        active = active[changed]
        if not active.size:
            break
    return result


def _best(after: F64, peak: F64) -> tuple[Bool, tuple[np.ndarray, ...]]:
    """The lowest entry of each after[b]: whether it is below the peak, and its indices."""
    flat = after.reshape(len(after), -1)
    best = np.argmin(flat, axis=1)
    gained = flat[np.arange(len(after)), best] < peak * (1 - _MIN_STEP)
    return gained, np.unravel_index(best[gained], after.shape[1:])


def _swap(state: _State) -> Bool:
    """Apply each row's best swap in place; returns [B] whether there was one."""
    slots, rows, peak_rank = state.slots, state.rows, state.peak_rank
    held = held_by_rank(slots, state.num_experts)
    # axes: row, slot of the fullest rank, other rank, slot there
    moved = state.mine_value[:, :, None, None] - state.value[:, None]
    after = np.maximum(
        state.peak[:, None, None, None] - moved, state.rank_load[:, None, :, None] + moved
    )
    after[held[rows[:, None], :, state.mine]] = np.inf  # already there
    already_here = held[rows[:, None, None], peak_rank[:, None, None], slots]
    np.copyto(after, np.inf, where=already_here[:, None])
    after[rows, :, peak_rank] = np.inf
    gained, (mine, rank, theirs) = _best(after, state.peak)
    row, here = rows[gained], peak_rank[gained]
    slots[row, here, mine], slots[row, rank, theirs] = (
        slots[row, rank, theirs],
        slots[row, here, mine],
    )
    return gained


def _split(state: _State, num_replicas: int) -> Bool:
    """Apply each row's best split in place; returns [B] whether there was one."""
    rows = state.rows
    order = np.argsort(-state.mine_value, axis=1, kind="stable")
    split = np.take_along_axis(state.mine, order[:, :_NUM_SPLIT], 1)
    spare = np.maximum(state.counts - 1, 1)
    rise = state.load / spare - state.share  # what the others of an expert get when one goes
    flat = state.slots.reshape(len(rows), -1)
    cost = np.where(state.counts > 1, rise, np.inf)
    cost[state.counts[:, :-1].sum(axis=1) >= num_replicas, -1] = np.inf  # empty slots stay empty
    cost = np.take_along_axis(cost, flat, 1)
    donor = np.argsort(cost, axis=1, kind="stable")[:, :_NUM_DONORS]
    after = _after_split(state, split, donor, rise)
    after += np.where(np.isinf(np.take_along_axis(cost, donor, 1)), np.inf, 0.0)[:, None]
    gained, (which, place) = _best(after, state.peak)
    row = rows[gained]
    flat[row, donor[row, place]] = split[row, which]
    return gained


def _after_split(state: _State, split: I64, donor: I64, rise: F64) -> F64:
    """[B, I, D] highest load among the ranks that split i in slot d touches; inf = not allowed."""
    rows = state.rows[:, None]
    num_ranks, num_slots = state.slots.shape[1:]
    gone = np.take_along_axis(state.slots.reshape(len(rows), -1), donor, 1)
    donor_rank = donor // num_slots
    new_share = state.load / (state.counts + 1)
    on_ranks = np.zeros((len(rows), num_ranks, state.num_experts + 1))
    np.add.at(on_ranks, (rows[:, :, None], np.arange(num_ranks)[:, None], state.slots), 1.0)
    on_ranks[:, :, -1] = 0
    up = np.take_along_axis(on_ranks, gone[:, None], 2) * rise[rows, gone][:, None]
    down = np.take_along_axis(on_ranks, split[:, None], 2)
    down *= (state.share - new_share)[rows, split][:, None]
    # axes: row, split expert, donor slot, rank
    change = up.transpose(0, 2, 1)[:, None] - down.transpose(0, 2, 1)[:, :, None]
    there = np.zeros((len(rows), donor.shape[1], num_ranks))
    np.put_along_axis(there, donor_rank[:, :, None], 1.0, axis=2)
    swapped = new_share[rows, split][:, :, None] - (state.share + rise)[rows, gone][:, None]
    change += there[:, None] * swapped[:, :, :, None]
    after = state.rank_load[:, None, None] + change
    worst: F64 = np.where(change != 0, after, 0.0).max(axis=3)
    here = after[state.rows, :, :, state.peak_rank]
    allowed = on_ranks[rows[:, :, None], donor_rank[:, None], split[:, :, None]] == 0
    allowed &= here < state.peak[:, None, None]
    allowed &= (split < state.num_experts)[:, :, None]
    worst[~allowed] = np.inf
    return worst
