"""One migration of experts between workers: LOAD and FLIP, tick by tick, within bounds.

DROP needs nothing: the weights are mapped, and the kernel drops what it must.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Final, Protocol

from xdeepserve.eplb import (
    ExpertLoadReport,
    ExpertMove,
    ExpertPlacement,
    MigrationTick,
    Phase,
    hold_ranks,
    migrate,
)

logger = logging.getLogger(__name__)

MAX_MOVES: Final = 16
"""Of a tick: what a worker must make present before the next flip stays small."""
MAX_STAGED_PER_RANK: Final = 8

Flip = Callable[[ExpertPlacement, int], Awaitable[bool]]


class ExpertWorkers(Protocol):
    """The workers, as far as the balancer needs them; calls have deadlines of their own."""

    async def reports(self) -> Mapping[str, ExpertLoadReport]:
        """Running totals of each DP group that answers, by its name and life."""
        ...

    async def load(self, rank: int, experts: Sequence[tuple[int, int]]) -> bool:
        """Whether a worker has made the weights of (layer, expert) present."""
        ...


async def carry_out(
    current: ExpertPlacement,
    target: ExpertPlacement,
    *,
    ranks: Sequence[int],
    layers: Sequence[int],
    workers: ExpertWorkers,
    flip: Flip,
) -> bool:
    """Go from current to target; False when something is left to do.

    A worker that does not load its experts keeps what it has, and the others go on as far as that
    is possible without it. When `flip` is False, all ends there.

    Args:
        current: the experts as they are placed.
        target: as they should be.
        ranks: of the expert workers that the placements are of.
        layers: to migrate, in this order.
        workers: have the experts present before tokens come.
        flip: puts a placement in force, for which so many experts were loaded; False = it must
            not be any more.
    """
    way = _Way(current, target, ranks=ranks, layers=layers)
    while not await way.go(workers, flip):
        logger.info("the migration goes on without those")
    return way.has_arrived


class _Way:
    """A migration under way: the placement in force, and the ranks that load nothing."""

    def __init__(
        self,
        current: ExpertPlacement,
        target: ExpertPlacement,
        *,
        ranks: Sequence[int],
        layers: Sequence[int],
    ) -> None:
        self.has_arrived = False
        self._current = current
        self._target = target
        self._ranks = ranks
        self._layers = layers
        self._held: set[int] = set()
        """Positions in `ranks`."""

    async def go(self, workers: ExpertWorkers, flip: Flip) -> bool:
        """Go as far as possible; False when a rank is to be held that was not before."""
        num_loaded = 0
        for tick in self._ticks():
            if tick.phase is Phase.LOAD:
                num_loaded = len(tick.moves)
                if late := await _load_experts(workers, self._ranks, tick.moves):
                    self._held |= late
                    return False
            elif tick.phase is Phase.FLIP:
                if not await flip(tick.placement, num_loaded):
                    return True
                self._current, num_loaded = tick.placement, 0
        self.has_arrived = not self._held
        return True

    def _ticks(self) -> Iterator[MigrationTick]:
        target = self._target
        if self._held:
            target = hold_ranks(self._current, target, self._held)
        return migrate(
            self._current,
            target,
            max_moves=MAX_MOVES,
            max_staged_per_rank=MAX_STAGED_PER_RANK,
            layers=self._layers,
        )


async def _load_experts(
    workers: ExpertWorkers, ranks: Sequence[int], moves: Sequence[ExpertMove]
) -> set[int]:
    """Positions of the ranks whose weights are not all present; tokens would wait for those."""
    wanted: dict[int, list[tuple[int, int]]] = {}
    for move in moves:
        wanted.setdefault(move.to_rank, []).append((move.layer_idx, move.expert))
    done = await asyncio.gather(*(workers.load(ranks[to], what) for to, what in wanted.items()))
    late = {to for to, is_done in zip(wanted, done, strict=True) if not is_done}
    for to in sorted(late):
        logger.warning("expert worker %d did not load its experts; it gets none", ranks[to])
    return late
