"""RouteKeeper: the routing table in force seen together with which ranks answer at present.

A rank is lost while it is not linked, dead or frozen; it is back when a new life of it is linked,
or when its heart beats again. Exchanges report losses; recoveries are found by looking.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.ops import I32
from xdeepserve.transformerless.moe_transport import StepTag
from xdeepserve.transformerless.routing import NOBODY, LiveRouting, RoutingTable
from xdeepserve.xccl import PeerState, Port

LOOK_INTERVAL_S: Final = 0.005
"""Between two looks for ranks that came back while some are lost."""

AVOIDED_S: Final = 10.0
"""How long a rank that let a request time out is not asked again, though it seems to live."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Route:
    """Who answers for one exchange at this moment.

    Attributes:
        epoch: for the tags of exchanges; grows with every look at who answers.
        ffn_rank: -1 = nobody at present, or the asker itself.
        expert_owners: [R * E] int32 by instance id; -1 = nobody at present.
        has_experts: every instance has an owner that answers.
        num_experts: E.
    """

    epoch: int
    ffn_rank: int
    expert_owners: I32
    has_experts: bool
    num_experts: int


class RouteKeeper:
    """Thread: the port's."""

    def __init__(self, port: Port, routing: LiveRouting) -> None:
        self._port = port
        self._routing = routing
        self._epoch = 0
        self._was_complete = False
        self._next_look_s = 0.0
        self._avoided_until_s: dict[int, float] = {}
        self._use(routing.current)

    def table(self) -> RoutingTable:
        """The table in force, looked at anew when it has been swapped or ranks are lost."""
        if self._routing.current is not self._table:
            self._use(self._routing.current)
        elif self._lost and SYSTEM_CLOCK.monotonic() >= self._next_look_s:
            self.look()
        return self._table

    def route(self, tag: StepTag) -> Route:
        """Who answers for an exchange, as of the latest look.

        FFN ranks take turns by layer, microbatch and step, and each asker begins with another one.
        """
        turn = self._port.rank + tag.step_idx + tag.layer_idx + tag.microbatch_idx
        return Route(
            self._epoch,
            self._ffn_ranks[turn % len(self._ffn_ranks)] if self._ffn_ranks else NOBODY,
            self._owners[tag.layer_idx],
            self._has_experts,
            self._table.num_replicas.shape[1],
        )

    @property
    def is_complete(self) -> bool:
        """Whether every module that ranks serve has one that answers, as of the latest look."""
        has_ffn = self._ffn_ranks or not self._table.ffn_ranks
        return bool(has_ffn) and (self._has_experts or not self._table.expert_ranks)

    def look(self) -> None:
        """Link newcomers, and look at every rank of the table now."""
        self._port.discover_news()
        ranks = {*self._table.ffn_ranks, *self._table.expert_ranks}
        lost = frozenset(rank for rank in ranks if not self._answers(rank))
        self._next_look_s = SYSTEM_CLOCK.monotonic() + LOOK_INTERVAL_S
        self._epoch += 1
        if lost != self._lost:
            # At the start it is no news that some are not there yet.
            level = logging.WARNING if self._was_complete else logging.INFO
            logger.log(level, "ranks that do not answer: %s", sorted(lost) or "none any more")
            self._reckon(lost)
        self._was_complete = self._was_complete or not lost

    def avoid(self, ranks: Iterable[int]) -> None:
        """Count ranks as lost for a while: they live, but do not answer."""
        until_s = SYSTEM_CLOCK.monotonic() + AVOIDED_S
        self._avoided_until_s.update(dict.fromkeys(ranks, until_s))
        self.look()

    def _use(self, table: RoutingTable) -> None:
        self._table = table
        self._reckon(frozenset())
        self.look()

    def _reckon(self, lost: frozenset[int]) -> None:
        """Who answers while `lost` do not."""
        table = self._table
        self._lost = lost
        self._owners = table.expert_owners(lost)
        self._ffn_ranks = [rank for rank in table.ffn_ranks if rank not in lost]
        self._has_experts = any(rank not in lost for rank in table.expert_ranks)

    def _answers(self, rank: int) -> bool:
        if not self._port.is_linked(rank):
            return False
        if SYSTEM_CLOCK.monotonic() < self._avoided_until_s.get(rank, 0.0):
            return False
        return self._port.status_of(rank).state is PeerState.ALIVE
