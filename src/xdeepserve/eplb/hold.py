"""A target that asks nothing of some ranks: what can be reached while they load nothing."""

from __future__ import annotations

from collections.abc import Collection

from xdeepserve.eplb.placement import EMPTY, ExpertPlacement, align_slots, require_same_shape


def hold_ranks(
    current: ExpertPlacement, target: ExpertPlacement, ranks: Collection[int]
) -> ExpertPlacement:
    """The target as far as it leaves the slots of `ranks` alone; every expert stays somewhere.

    A rank that would give an expert to one of `ranks` keeps it, and what was to come in its place
    stays where it was, in turn.

    Args:
        current: in force now.
        target: of the same shape.
        ranks: positions of the ranks, from 0, that keep what they hold.

    Raises:
        ConfigError: the placements differ in shape.
    """
    require_same_shape(current, target)
    table = align_slots(target, current).physical_to_logical.copy()
    per_rank = current.slots_per_rank
    for now, wanted in zip(current.physical_to_logical, table, strict=True):
        for rank in ranks:
            wanted[rank * per_rank : (rank + 1) * per_rank] = now[
                rank * per_rank : (rank + 1) * per_rank
            ]
        # Each round puts back at least one slot; with all of them back nothing is missing.
        while missing := set(now.tolist()) - set(wanted.tolist()) - {EMPTY}:
            for slot, expert in enumerate(now.tolist()):
                if expert in missing:
                    wanted[slot] = expert
                    missing.discard(expert)
    return current.with_physical(table)
