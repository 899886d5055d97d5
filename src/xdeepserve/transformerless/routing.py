"""RoutingTable: which rank computes what. One mechanism for scaling, expert balancing and failover.

    placement, ranks --> RoutingTable(epoch n) --swap--> LiveRouting.current   read at each dispatch
                                |
                                +-- expert_owners(lost ranks) --> who answers meanwhile

A table is immutable; a new one with a higher epoch replaces it atomically. Exchanges under way end
on the table they started with. Tokens do not depend on it: every rank computes equal bits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from xdeepserve.errors import ConfigError
from xdeepserve.ops import I32

NOBODY = -1
"""Rank of a replica that is not there."""


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTable:
    """An immutable assignment of a model's FFNs and experts to ranks.

    Replica n of expert e of a layer has the instance id n * E + e.

    Attributes:
        epoch: grows with each table.
        ffn_ranks: each computes all dense MLPs and shared experts; () = the asker does itself.
        expert_ranks: ranks that hold experts; () = the asker computes them itself.
        rank_of_instance: [L, R * E] int32; -1 = there is no such replica.
        num_replicas: [L, E] int32, at least 1 (but for an empty expert_ranks: 0).
    """

    epoch: int
    ffn_ranks: tuple[int, ...]
    expert_ranks: tuple[int, ...]
    rank_of_instance: I32
    num_replicas: I32

    @classmethod
    def build(
        cls,
        physical_to_logical: ArrayLike,
        *,
        num_experts: int,
        expert_ranks: Sequence[int],
        ffn_ranks: Sequence[int] = (),
        epoch: int = 0,
    ) -> RoutingTable:
        """The table of a placement.

        Args:
            physical_to_logical: [L, P] expert in each slot, -1 = empty; the first P / N slots are
                those of expert_ranks[0], and so on.
            num_experts: E.
            expert_ranks: N ranks; N divides P. Empty: P is 0.
            ffn_ranks: see the class.
            epoch: higher than the replaced table's.

        Raises:
            ConfigError: an expert has no replica or is out of range, or N does not divide P.
        """
        placed = np.asarray(physical_to_logical, np.int32)
        ranks = tuple(expert_ranks)
        _check(placed, num_experts, len(ranks))
        if not ranks:
            none = np.zeros((len(placed), 0), np.int32)
            return cls(epoch, tuple(ffn_ranks), (), none, none)
        replicas = _count(placed, num_experts)
        if (replicas == 0).any():
            layer_idx, expert = np.argwhere(replicas == 0)[0]
            raise ConfigError(f"layer {layer_idx}: expert {expert} has no replica")
        owners = _owners(placed, replicas, np.asarray(ranks, np.int32))
        return cls(epoch, tuple(ffn_ranks), ranks, owners, replicas)

    def instances(self, layer_idx: int, topk_ids: I32, turn: int = 0) -> I32:
        """[T, K] instance ids of experts topk_ids [T, K]; -1 stays -1.

        Replicas are taken in turn by row, which spreads a step's tokens without any state. The
        first row takes replica `turn`, so that a step of one row spreads too if that moves on.
        """
        num_experts = self.num_replicas.shape[1]
        if self.rank_of_instance.shape[1] == num_experts:
            return topk_ids
        turns = np.arange(turn, turn + topk_ids.shape[0])[:, None]
        nth = (turns % self.num_replicas[layer_idx][topk_ids]).astype(np.int32)
        instances: I32 = topk_ids + nth * np.int32(num_experts)
        return np.where(topk_ids < 0, np.int32(NOBODY), instances)

    def expert_owners(self, lost: Collection[int]) -> I32:
        """[L, R * E]: the rank of each instance while some ranks do not answer.

        An instance of a lost rank goes to another replica of its expert, else to any rank that
        is left (each can map all weights), else to nobody (-1).
        """
        if not lost or not self.expert_ranks:
            return self.rank_of_instance
        left = [rank for rank in self.expert_ranks if rank not in lost] or [NOBODY]
        num_layers, num_experts = self.num_replicas.shape
        by_replica = self.rank_of_instance.reshape(num_layers, -1, num_experts)
        is_left = np.isin(by_replica, left) & (by_replica != NOBODY)
        first = is_left.argmax(axis=1)[:, None, :]
        replica = np.take_along_axis(by_replica, first, axis=1)
        anyone = np.asarray(left, np.int32)[np.arange(num_experts) % len(left)]
        substitute = np.where(is_left.any(axis=1, keepdims=True), replica, anyone)
        owners: I32 = np.where(np.isin(by_replica, list(lost)), substitute, by_replica)
        return owners.reshape(num_layers, -1)


def _check(placed: I32, num_experts: int, num_ranks: int) -> None:
    if placed.ndim != 2 or (placed.shape[1] % num_ranks if num_ranks else placed.shape[1]):
        raise ConfigError(
            f"a placement of shape {placed.shape} must be [layers, slots] with equally many slots "
            f"on each of {num_ranks} ranks"
        )
    if placed.size and not NOBODY <= placed.min() <= placed.max() < num_experts:
        raise ConfigError(f"a placement names an expert outside [0, {num_experts})")


def _count(placed: I32, num_experts: int) -> I32:
    """[L, E]: slots of each expert."""
    num_layers = len(placed)
    places = np.arange(num_layers)[:, None] * num_experts + placed
    counts = np.bincount(places[placed >= 0], minlength=num_layers * num_experts)
    return counts.reshape(num_layers, num_experts).astype(np.int32)


def _owners(placed: I32, replicas: I32, ranks: I32) -> I32:
    """[L, R * E]: see rank_of_instance. All layers at once: a swap must not hold up a step."""
    num_layers, num_slots = placed.shape
    order = np.argsort(placed, axis=1, kind="stable")  # empty slots first, then by expert
    experts = np.take_along_axis(placed, order, axis=1)
    layers, places = np.nonzero(experts >= 0)
    expert = experts[layers, places]
    first = num_slots - replicas[:, ::-1].cumsum(axis=1)[:, ::-1]
    owners = np.full((num_layers, int(replicas.max()), replicas.shape[1]), NOBODY, np.int32)
    owner = np.repeat(ranks, num_slots // len(ranks))[order[layers, places]]
    owners[layers, places - first[layers, expert], expert] = owner
    return owners.reshape(num_layers, -1)


class LiveRouting:
    """The table in force. Any thread swaps; readers take `current` once per exchange."""

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
