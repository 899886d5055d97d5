"""Placement: which FFN and expert workers compute what; the supervisor's part of the routing.

first_placement --> Placement(epoch n) --published with the membership-->
    DP groups: routing_table(placement) --> LiveRouting.swap
workers come and go --> moved_to(ranks): complete at once, new ranks still empty, no search
load, new ranks     --> plan_experts(load): where to migrate by ticks
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import chain
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from xdeepserve.eplb import ExpertPlacement, place_experts, resize
from xdeepserve.launch.deployment import Slices
from xdeepserve.launch.fabric import Fabric
from xdeepserve.launch.plan import ModelShape
from xdeepserve.transformerless.routing import RoutingTable

EMPTY = -1
"""Content of a slot that holds no expert."""

TOLERANCE: Final = 0.01
"""How much better a peak must be, as a fraction, to be worth more moves."""


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """An assignment of modules to workers.

    Attributes:
        epoch: grows with each placement of a run.
        ffn: ranks of the FFN workers in use; () = the DP groups compute FFNs themselves.
        expert: ranks of the expert workers in use; () = likewise.
        table: [L][P] expert in each slot, -1 = empty; the first P / N slots of a layer are those
            of expert[0], and so on.
    """

    epoch: int
    ffn: tuple[int, ...]
    expert: tuple[int, ...]
    table: list[list[int]]


def base_table(shape: ModelShape, slices: Slices, replicas: int) -> list[list[int]]:
    """[L][P]: each worker's slice, and as redundant experts the first ones of those after it.

    Args:
        shape: of the model.
        slices: [start, stop) of each worker; () = no expert workers.
        replicas: redundant experts on each worker.
    """
    held = [list(range(start, stop)) for start, stop in slices]
    for rank, experts in enumerate(held):
        others = chain.from_iterable(
            range(*slices[(rank + step) % len(slices)]) for step in range(1, len(slices))
        )
        own = set(experts)
        experts += [expert for expert in others if expert not in own][:replicas]
    width = max(map(len, held), default=0)
    row = list(chain.from_iterable(e + [EMPTY] * (width - len(e)) for e in held))
    return [row] * shape.num_layers


def routing_table(placement: Placement, shape: ModelShape, fabric: Fabric) -> RoutingTable:
    """The placement in XCCL ranks."""
    return RoutingTable.build(
        placement.table,
        num_experts=shape.num_experts,
        expert_ranks=[fabric.rank_of("expert", rank) for rank in placement.expert],
        ffn_ranks=[fabric.rank_of("ffn", rank) for rank in placement.ffn],
        epoch=placement.epoch,
    )


def ranks_in_use(
    current: Collection[int] | None, wanted: Collection[int], ready: Collection[int]
) -> tuple[int, ...]:
    """Ranks of a role that are given work.

    Args:
        current: in use now; None at the start, when all that are wanted are waited for.
        wanted: a rank that is not wanted gets nothing from now on.
        ready: a new rank joins when it can serve. One that crashed stays: the DP groups go round
            it until it is back.

    Returns:
        Sorted; () = there is none at present, the DP groups do the work.
    """
    if current is None:
        return tuple(sorted(wanted))
    return tuple(sorted(rank for rank in wanted if rank in current or rank in ready))


def idle_ranks(placement: Placement) -> tuple[int, ...]:
    """Expert ranks in use that hold no expert in some layer: they joined and are not filled yet.

    Where there are few experts for the ranks, or few with tokens, a rank may stay without.
    """
    rows = _experts_by_rank(placement)
    return tuple(rank for rank, row in zip(placement.expert, rows, strict=True) if not all(row))


def experts_of(placement: Placement, rank: int) -> list[list[int]]:
    """What an expert rank in use holds in each layer, replicas included."""
    rows = dict(zip(placement.expert, _experts_by_rank(placement), strict=True))
    return rows[rank]


def moved_to(
    placement: Placement,
    *,
    ffn: tuple[int, ...],
    expert: tuple[int, ...],
    load: NDArray[np.float64],
) -> Placement:
    """The next placement, for other ranks: what stays keeps its experts, new ranks get none yet.

    Where the last replica of an expert leaves, the least loaded of the others takes over at once:
    no search, as who publishes cannot wait for one.

    Args:
        placement: in force.
        ffn, expert: ranks in use from now on.
        load: [L, E] tokens per expert.
    """
    table = placement.table
    if expert != placement.expert:
        held = _on_ranks(placement, expert)
        for layer_idx, layer_load in enumerate(load.tolist()):
            _adopt_orphans([rows[layer_idx] for rows in held], layer_load)
        table = _table(held)
    return Placement(epoch=placement.epoch + 1, ffn=ffn, expert=expert, table=table)


def _adopt_orphans(ranks: list[list[int]], load: list[float]) -> None:
    """Give the experts of a layer that no rank has to the least loaded ranks, heaviest first.

    Args:
        ranks: experts of each rank, extended here.
        load: of each expert.
    """
    num_replicas = Counter(chain.from_iterable(ranks))
    rank_load = [sum(load[e] / num_replicas[e] for e in experts) for experts in ranks]
    orphans = [expert for expert in range(len(load)) if expert not in num_replicas]
    for expert in sorted(orphans, key=lambda expert: -load[expert]):
        lightest = rank_load.index(min(rank_load))
        ranks[lightest].append(expert)
        rank_load[lightest] += load[expert]


def plan_experts(
    placement: Placement, load: NDArray[np.float64], replicas: int
) -> tuple[ExpertPlacement, ExpertPlacement]:
    """The experts as they are placed, and as they should be for this load; of one shape.

    Args:
        placement: in force, with at least one expert rank.
        load: [L, E] tokens per expert.
        replicas: redundant experts on each worker.
    """
    num_experts, num_ranks = load.shape[1], len(placement.expert)
    # One worker holds all experts, and none holds an expert twice.
    num_replicas = min(num_experts + replicas * num_ranks, num_experts * num_ranks)
    num_slots = -(-num_replicas // num_ranks)
    # Beyond what a rank will hold, its last slots go first: at the start the redundant ones.
    target = place_experts(
        load,
        num_replicas=num_replicas,
        num_ranks=num_ranks,
        current=_arranged(placement, num_experts, exact_slots=num_slots),
        tolerance=TOLERANCE,
    )
    current = _arranged(placement, num_experts, min_slots=num_slots)
    slots = current.slots_per_rank
    return current, resize(target, num_ranks=num_ranks, slots_per_rank=slots)


def with_experts(placement: Placement, experts: ExpertPlacement) -> Placement:
    """The next placement, with these experts on the same ranks."""
    return Placement(
        epoch=placement.epoch + 1,
        ffn=placement.ffn,
        expert=placement.expert,
        table=experts.physical_to_logical.tolist(),
    )


def expert_placement(placement: Placement, num_experts: int) -> ExpertPlacement:
    """The experts as they are placed."""
    return _arranged(placement, num_experts)


def _arranged(
    placement: Placement,
    num_experts: int,
    *,
    min_slots: int = 1,
    exact_slots: int | None = None,
) -> ExpertPlacement:
    """The placed experts with so many slots on a rank; some are missing where these are few."""
    table = _table(_experts_by_rank(placement), min_slots=min_slots, exact_slots=exact_slots)
    num_ranks = len(placement.expert)
    return ExpertPlacement.from_physical(table, num_experts=num_experts, num_ranks=num_ranks)


def _on_ranks(placement: Placement, ranks: tuple[int, ...]) -> list[list[list[int]]]:
    """The placed experts by rank and layer; nothing on ranks that are not in use yet."""
    held = dict(zip(placement.expert, _experts_by_rank(placement), strict=True))
    return [held.get(rank) or [[] for _ in placement.table] for rank in ranks]


def _table(
    held: list[list[list[int]]], *, min_slots: int = 1, exact_slots: int | None = None
) -> list[list[int]]:
    """[L][P] of the experts by rank and layer."""
    num_slots = exact_slots or max(min_slots, *(len(row) for rows in held for row in rows), 1)
    return [
        list(chain.from_iterable(_slots(rank, num_slots) for rank in layer))
        for layer in zip(*held, strict=True)
    ]


def _slots(experts: list[int], num_slots: int) -> list[int]:
    return experts[:num_slots] + [EMPTY] * (num_slots - len(experts))


def _experts_by_rank(placement: Placement) -> list[list[list[int]]]:
    """For each rank in use, the experts of each layer, in the order of its slots."""
    if not placement.expert:
        return []
    width = len(placement.table[0]) // len(placement.expert)
    return [
        [[e for e in row[start : start + width] if e != EMPTY] for row in placement.table]
        for start in range(0, width * len(placement.expert), width)
    ]
