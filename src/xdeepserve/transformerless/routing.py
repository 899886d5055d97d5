"""RoutingTable: which physical expert serves a logical one. One mechanism for scaling, expert
balancing and failover: a new table with a higher epoch replaces the old one atomically.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xdeepserve.errors import ConfigError
from xdeepserve.ops import I32


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTable:
    """An immutable placement. Tokens do not depend on it: replicas compute equal bits.

    Attributes:
        epoch: grows with each table; echoed in every exchange.
        logical_to_physical: [L, E, R] int32; replicas of a logical expert, padded with -1.
        num_replicas: [L, E] int32, at least 1.
        num_physical: P, physical experts per layer; hosts own consecutive ranges of them.
        is_identity: physical ids are logical ids.
    """

    epoch: int
    logical_to_physical: I32
    num_replicas: I32
    num_physical: int
    is_identity: bool

    @classmethod
    def identity(cls, *, num_layers: int, num_experts: int, epoch: int = 0) -> RoutingTable:
        """One replica each, physical id = logical id: the colocated placement."""
        ids = np.arange(num_experts, dtype=np.int32)
        table = np.broadcast_to(ids[:, None], (num_layers, num_experts, 1))
        replicas = np.ones((num_layers, num_experts), np.int32)
        return cls(epoch, table, replicas, num_experts, is_identity=True)

    @classmethod
    def from_physical(
        cls, physical_to_logical: Sequence[Sequence[int]], *, num_experts: int, epoch: int
    ) -> RoutingTable:
        """The table of a placement.

        Args:
            physical_to_logical: [L][P]; the logical expert at each physical slot.
            num_experts: E.
            epoch: higher than the replaced table's.

        Raises:
            ConfigError: a logical expert has no replica, or an id is out of range.
        """
        placed = np.asarray(physical_to_logical, np.int32)
        num_layers, num_physical = placed.shape
        if placed.min() < 0 or placed.max() >= num_experts:
            raise ConfigError(f"a placement names an expert outside [0, {num_experts})")
        replicas = np.stack([np.bincount(row, minlength=num_experts) for row in placed])
        if (replicas == 0).any():
            layer_idx, expert = np.argwhere(replicas == 0)[0]
            raise ConfigError(f"layer {layer_idx}: expert {expert} has no replica")
        table = np.full((num_layers, num_experts, int(replicas.max())), -1, np.int32)
        for layer_idx, row in enumerate(placed):
            order = np.argsort(row, kind="stable")
            nth = np.concatenate([np.arange(n) for n in replicas[layer_idx]])
            table[layer_idx, row[order], nth] = order
        return cls(epoch, table, replicas.astype(np.int32), num_physical, is_identity=False)

    def to_physical(self, layer_idx: int, topk_ids: I32) -> I32:
        """[T, K] physical ids of logical topk_ids [T, K]; -1 stays -1.

        Replicas are taken in turn by row, which spreads a step's tokens without any state.
        """
        if self.is_identity:
            return topk_ids
        replicas = self.num_replicas[layer_idx][topk_ids]
        turn = np.arange(topk_ids.shape[0], dtype=np.int32)[:, None] % replicas
        physical: I32 = self.logical_to_physical[layer_idx][topk_ids, turn]
        return np.where(topk_ids < 0, np.int32(-1), physical)


class LiveRouting:
    """The table in force. Readers take `current` once per exchange and keep that table."""

    def __init__(self, table: RoutingTable) -> None:
        self._current = table

    @property
    def current(self) -> RoutingTable:
        """The latest table."""
        return self._current

    def swap(self, table: RoutingTable) -> None:
        """Replace the table; exchanges under way finish on the one they started with.

        Raises:
            ConfigError: the epoch does not grow.
        """
        if table.epoch <= self._current.epoch:
            raise ConfigError(
                f"routing epoch {table.epoch} must be above the current {self._current.epoch}"
            )
        self._current = table
