"""ExpertPlacement: which logical expert sits in which physical slot, layer by layer.

Rank r owns the consecutive slots [r * slots_per_rank, (r + 1) * slots_per_rank) of every layer. The
values are plain data; how they are chosen is elsewhere (`place`, `published`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from xdeepserve.errors import ConfigError, IntegrityError
from xdeepserve.ops import I32

EMPTY = -1
"""Content of a physical slot that holds no expert."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPlacement:
    """An immutable placement of E logical experts in P physical slots of each of L layers.

    Attributes:
        physical_to_logical: [L, P] int32; the expert in each slot, -1 = empty.
        logical_to_physical: [L, E, R] int32; slots of each expert, ascending, padded with -1.
        num_replicas: [L, E] int32.
        num_ranks: number of ranks; divides P.
    """

    physical_to_logical: I32
    logical_to_physical: I32
    num_replicas: I32
    num_ranks: int

    @classmethod
    def from_physical(
        cls, physical_to_logical: ArrayLike, *, num_experts: int, num_ranks: int
    ) -> ExpertPlacement:
        """The placement of a table [L, P]; experts without a replica are allowed here.

        Raises:
            ConfigError: the table is not [L, P], an id is out of range, or num_ranks does not
                divide P.
        """
        physical = np.array(physical_to_logical, np.int32)
        _check_table(physical, num_experts, num_ranks)
        num_layers, num_slots = physical.shape
        layers = np.arange(num_layers)[:, None]
        counts = np.zeros((num_layers, num_experts + 1), np.int32)
        np.add.at(counts, (layers, physical), 1)  # empty slots count in the last column
        order = np.argsort(physical, axis=1, kind="stable")
        experts = np.take_along_axis(physical, order, 1)
        offsets = np.cumsum(counts[:, :-1], axis=1) - counts[:, :-1] + counts[:, -1:]
        nth = np.arange(num_slots) - np.take_along_axis(offsets, np.maximum(experts, 0), 1)
        width = max(int(counts[:, :-1].max(initial=1)), 1)
        logical = np.full((num_layers, num_experts, width), EMPTY, np.int32)
        used = experts >= 0
        logical[np.nonzero(used)[0], experts[used], nth[used]] = order[used]
        return cls(physical, logical, counts[:, :-1].copy(), num_ranks)

    @classmethod
    def contiguous(cls, *, num_layers: int, num_experts: int, num_ranks: int) -> ExpertPlacement:
        """One replica each, in order, as evenly as the ranks allow: where a service starts."""
        slots_per_rank = -(-num_experts // num_ranks)
        row = np.full((num_ranks, slots_per_rank), EMPTY, np.int32)
        for rank, experts in enumerate(np.array_split(np.arange(num_experts), num_ranks)):
            row[rank, : experts.size] = experts
        table = np.broadcast_to(row.ravel(), (num_layers, row.size))
        return cls.from_physical(table, num_experts=num_experts, num_ranks=num_ranks)

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.physical_to_logical.shape[0])

    @property
    def num_slots(self) -> int:
        """P, the physical slots of a layer on all ranks together."""
        return int(self.physical_to_logical.shape[1])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.num_replicas.shape[1])

    @property
    def slots_per_rank(self) -> int:
        """Slots of one rank in one layer."""
        return self.num_slots // self.num_ranks

    def by_rank(self) -> I32:
        """[L, num_ranks, slots_per_rank] view of physical_to_logical."""
        return self.physical_to_logical.reshape(self.num_layers, self.num_ranks, -1)

    def replicas_on_ranks(self) -> I32:
        """[L, num_ranks, E] int32: how many replicas of each expert a rank holds."""
        held = np.zeros((self.num_layers, self.num_ranks, self.num_experts + 1), np.int32)
        layers, ranks = np.ogrid[: self.num_layers, : self.num_ranks]
        np.add.at(held, (layers[:, :, None], ranks[:, :, None], self.by_rank()), 1)
        return held[:, :, :-1]

    def with_physical(self, physical_to_logical: ArrayLike) -> ExpertPlacement:
        """The same experts and ranks with another table."""
        return ExpertPlacement.from_physical(
            physical_to_logical, num_experts=self.num_experts, num_ranks=self.num_ranks
        )


def _check_table(physical: I32, num_experts: int, num_ranks: int) -> None:
    if physical.ndim != 2:
        raise ConfigError(f"a placement of shape {physical.shape} must be [layers, slots]")
    if num_ranks < 1 or physical.shape[1] % num_ranks:
        raise ConfigError(
            f"{physical.shape[1]} slots do not divide among {num_ranks} ranks; "
            "give every rank equally many"
        )
    if physical.size and not (physical.min() >= EMPTY and physical.max() < num_experts):
        raise ConfigError(f"a placement names an expert outside [0, {num_experts})")


def check_placement(placement: ExpertPlacement, *, slots_per_rank: int | None = None) -> None:
    """Assert the invariant: every expert has a replica, no rank holds more than its slots.

    Args:
        placement: what to check; its three tables must agree.
        slots_per_rank: the capacity of a rank; None = what the placement itself declares.

    Raises:
        IntegrityError: with layer, expert or rank, and the limit.
    """
    missing = np.argwhere(placement.num_replicas < 1)
    if missing.size:
        layer_idx, expert = missing[0]
        raise IntegrityError(f"layer {layer_idx}: expert {expert} has no replica")
    if slots_per_rank is not None:
        used = np.count_nonzero(placement.by_rank() != EMPTY, axis=2)
        if used.max() > slots_per_rank:
            layer_idx, rank = np.argwhere(used > slots_per_rank)[0]
            raise IntegrityError(
                f"layer {layer_idx}: rank {rank} holds {used[layer_idx, rank]} experts, "
                f"more than its {slots_per_rank} slots"
            )
    twin = placement.with_physical(placement.physical_to_logical)
    if not (
        np.array_equal(twin.logical_to_physical, placement.logical_to_physical)
        and np.array_equal(twin.num_replicas, placement.num_replicas)
    ):
        raise IntegrityError("the tables of a placement contradict each other")


def resize(placement: ExpertPlacement, *, num_ranks: int, slots_per_rank: int) -> ExpertPlacement:
    """The placement on more or fewer ranks or slots: added ones are empty, removed ones are lost.

    The result may leave experts without a replica; it serves as `current` of a new placement and
    of the migration to it.

    Raises:
        ConfigError: a rank that stays holds more experts than slots_per_rank.
    """
    old = placement.by_rank()
    kept = min(num_ranks, placement.num_ranks)
    table = np.full((placement.num_layers, num_ranks, slots_per_rank), EMPTY, np.int32)
    packed = -np.sort(-old[:, :kept], axis=2)  # empty slots last
    if np.any(packed[:, :, slots_per_rank:] != EMPTY):
        raise ConfigError(f"a rank holds more experts than slots_per_rank={slots_per_rank}")
    width = min(slots_per_rank, placement.slots_per_rank)
    fits = bool(np.all(old[:, :kept, width:] == EMPTY))
    table[:, :kept, :width] = (old[:, :kept] if fits else packed)[:, :, :width]
    return ExpertPlacement.from_physical(
        table.reshape(placement.num_layers, -1),
        num_experts=placement.num_experts,
        num_ranks=num_ranks,
    )


def align_slots(target: ExpertPlacement, current: ExpertPlacement) -> ExpertPlacement:
    """`target` with the slots of each rank reordered so that what stays there keeps its slot.

    Raises:
        ConfigError: the two placements differ in layers, experts, ranks or slots.
    """
    require_same_shape(current, target)
    old, new = current.by_rank(), target.by_rank()
    aligned = np.full_like(new, EMPTY)
    changed = np.argwhere((old != new).any(axis=2))
    same = ~(old != new).any(axis=2)
    aligned[same] = new[same]
    for layer_idx, rank in changed:
        incoming = new[layer_idx, rank].tolist()
        row = aligned[layer_idx, rank]
        for slot, expert in enumerate(old[layer_idx, rank].tolist()):
            if expert in incoming:
                row[slot] = expert
                incoming.remove(expert)
            else:
                row[slot] = -2
        row[row == -2] = incoming
    return target.with_physical(aligned.reshape(target.num_layers, -1))


def require_same_shape(current: ExpertPlacement, target: ExpertPlacement) -> None:
    """Raises ConfigError unless both have the same layers, experts, ranks and slots."""
    if (
        current.physical_to_logical.shape != target.physical_to_logical.shape
        or current.num_ranks != target.num_ranks
        or current.num_experts != target.num_experts
    ):
        raise ConfigError(
            f"placements of {current.physical_to_logical.shape} slots on {current.num_ranks} "
            f"ranks and {target.physical_to_logical.shape} on {target.num_ranks} differ in shape; "
            "bring the current one to the new shape with `resize` first"
        )


def num_loads(current: ExpertPlacement, target: ExpertPlacement) -> int:
    """How many experts ranks must load to go from current to target (slots within a rank: free)."""
    require_same_shape(current, target)
    return int(loads_per_layer(current, target).sum())


def loads_per_layer(current: ExpertPlacement, target: ExpertPlacement) -> I32:
    """[L] experts that a rank holds in target and not in current, summed over the ranks."""
    new = (target.replicas_on_ranks() > 0) & (current.replicas_on_ranks() == 0)
    total: I32 = new.sum(axis=(1, 2), dtype=np.int32)
    return total
