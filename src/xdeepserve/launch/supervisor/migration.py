"""One migration of experts between workers: LOAD and FLIP, tick by tick, within bounds.

DROP needs nothing: the weights are mapped, and the kernel drops what it must.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Protocol

from xdeepserve.eplb import ExpertLoadReport, ExpertMove, ExpertPlacement, Phase, migrate

logger = logging.getLogger(__name__)

MAX_MOVES: Final = 16
"""Of a tick: what a worker must make present before the next flip stays small."""
MAX_STAGED_PER_RANK: Final = 8


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
    flip: Callable[[ExpertPlacement, int], Awaitable[bool]],
) -> bool:
    """Go from current to target; False when a worker did not load its experts, or `flip` is False.

    Args:
        current: the experts as they are placed.
        target: as they should be.
        ranks: of the expert workers that the placements are of.
        layers: to migrate, in this order.
        workers: have the experts present before tokens come.
        flip: puts a placement in force, for which so many experts were loaded; False = it must
            not be any more.
    """
    num_loaded = 0
    ticks = migrate(
        current,
        target,
        max_moves=MAX_MOVES,
        max_staged_per_rank=MAX_STAGED_PER_RANK,
        layers=layers,
    )
    for tick in ticks:
        if tick.phase is Phase.LOAD:
            num_loaded = len(tick.moves)
            if not await _load_experts(workers, ranks, tick.moves):
                return False
        elif tick.phase is Phase.FLIP:
            if not await flip(tick.placement, num_loaded):
                return False
            num_loaded = 0
    return True


async def _load_experts(
    workers: ExpertWorkers, ranks: Sequence[int], moves: Sequence[ExpertMove]
) -> bool:
    """Whether all weights are present; tokens would have to wait for those that are not."""
    wanted: dict[int, list[tuple[int, int]]] = {}
    for move in moves:
        wanted.setdefault(ranks[move.to_rank], []).append((move.layer_idx, move.expert))
    done = await asyncio.gather(*(workers.load(*item) for item in wanted.items()))
    late = [rank for rank, is_done in zip(wanted, done, strict=True) if not is_done]
    for rank in late:
        logger.warning("expert worker %d did not load its experts; the migration ends here", rank)
    return not late
