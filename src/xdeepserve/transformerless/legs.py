"""The two legs of an exchange: rows to one FFN rank, and rows to the ranks of their experts.

Each plans itself when it is made, and plans anew what lost ranks owe.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import numpy as np

from xdeepserve.errors import PeerLost
from xdeepserve.ops import F32, I32
from xdeepserve.transformerless.route_keeper import Route
from xdeepserve.transformerless.routing import NOBODY
from xdeepserve.xccl import Exchange, Port, Tag


class Module(IntEnum):
    """`kind` of a request: which unit of the tagged layer is asked."""

    FFN = 0
    EXPERT = 1


class Leg(Protocol):
    """Half of an exchange; waited for on its own."""

    exchange: Exchange

    def move(self, ranks: Sequence[int], route: Route, tag: Tag) -> bool:
        """Plan anew what `ranks` owe; False when `route` has nobody to take it."""
        ...


def is_answered(leg: Leg) -> bool:
    """Whether all answers are there. A lost rank is left to the wait, which moves its share."""
    try:
        return leg.exchange.is_done()
    except PeerLost:
        return False


class FfnLeg:
    """All rows to one rank, which answers with as many."""

    def __init__(self, port: Port, hidden_states: F32, route: Route, tag: Tag) -> None:
        self.exchange = port.exchange(hidden_states)
        num_rows = len(hidden_states)
        self.exchange.add(route.ffn_rank, tag=tag, kind=Module.FFN, reply_rows=num_rows)

    def move(self, ranks: Sequence[int], route: Route, tag: Tag) -> bool:
        """See Leg.move."""
        if route.ffn_rank == NOBODY:
            return False
        moved = [self.exchange.resend(rank, route.ffn_rank, tag) for rank in ranks]
        return any(moved)

    def rows(self) -> F32:
        """[T, H] view of the answer; valid until the exchange is released."""
        (reply,) = self.exchange.replies()
        rows: F32 = reply.rows
        return rows


class ExpertLeg:
    """Each row once to every rank that owns one of its experts; one row back per pair."""

    def __init__(
        self, port: Port, hidden_states: F32, instances: I32, route: Route, tag: Tag
    ) -> None:
        self._hidden_size = hidden_states.shape[1]
        self._num_instances = len(route.expert_owners)
        self.exchange = port.exchange(hidden_states)
        pairs, top_k = instances.reshape(-1), instances.shape[1]
        self.exchange.add_routed(pairs, top_k, None, route.expert_owners, tag, Module.EXPERT, [])

    def move(self, ranks: Sequence[int], route: Route, tag: Tag) -> bool:
        """See Leg.move."""
        if not route.has_experts:
            return False
        # By first replicas, which every table has: the one in force may be another by now.
        owners = np.resize(route.expert_owners[: route.num_experts], self._num_instances)
        return self.exchange.reroute(ranks, owners, tag)

    def combine(self, topk_weights: F32) -> F32:
        """[T, H]: the weighted sum of the answers in slot order, from 0."""
        out = np.empty((topk_weights.shape[0], self._hidden_size), np.float32)
        self.exchange.combine(topk_weights, out)
        return out

    def gather(self, out: F32) -> None:
        """Copies each answer to the row of out [T * K, H] that is its slot; leaves the others."""
        self.exchange.gather(out)
