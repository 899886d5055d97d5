"""Placement: which FFN and expert workers compute what; the supervisor's part of the routing.

base_table(slices, replicas) --> Placement(epoch n) --published with the membership-->
    DP groups: routing_table(placement) --> LiveRouting.swap
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain

import msgspec

from xdeepserve.launch.deployment import Slices
from xdeepserve.launch.fabric import Fabric
from xdeepserve.launch.plan import ModelShape
from xdeepserve.transformerless.routing import RoutingTable

EMPTY = -1
"""Content of a slot that holds no expert."""


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
    """
    if current is None:
        return tuple(sorted(wanted))
    kept = {rank for rank in wanted if rank in current or rank in ready}
    return tuple(sorted(kept or wanted))
