"""Balancer: owns the placement of a run: which workers are in use and which experts each holds.

    workers come and go --> place: the next placement at once, complete, new ranks still empty
    every second        --> look: counts of the DP groups
                              | ranks have come or gone      |
                              | every rebalance_interval_s,  +--> migrate by ticks: LOAD, FLIP
                              | if `decide` says so          |
    Rebalance request   --> rebalance

A migration whose placement was replaced by `place` meanwhile ends where it is: every tick's
placement is complete. The next look decides anew; so does the next supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final

from xdeepserve.clock import SYSTEM_CLOCK, Clock
from xdeepserve.eplb import ExpertLoadReport, ExpertPlacement, RebalancePolicy, decide
from xdeepserve.eplb.rows import F64
from xdeepserve.errors import CapacityError, ConfigError
from xdeepserve.launch.deployment import Deployment
from xdeepserve.launch.placement import (
    Placement,
    base_table,
    idle_ranks,
    moved_to,
    plan_experts,
    ranks_in_use,
    with_experts,
)
from xdeepserve.launch.plan import ModelShape, expert_slices, worker_name
from xdeepserve.launch.supervisor.expert_heat import expert_heat
from xdeepserve.launch.supervisor.expert_load import ExpertLoad
from xdeepserve.launch.supervisor.messages import ExpertHeat
from xdeepserve.launch.supervisor.migration import ExpertWorkers, carry_out

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S: Final = 1.0
WINDOW_S: Final = 10.0
"""Of counts, where nothing is rebalanced by itself; else a window is a rebalance interval."""
TICK_INTERVAL_S: Final = 0.05
RETRY_INTERVAL_S: Final = 5.0
"""Between two tries to spread the experts while a worker does not load them."""
MAX_TRIES: Final = 10
"""Of a rebalance that was asked for."""
COOLDOWN_INTERVALS: Final = 3
"""Rebalance intervals between two migrations for load."""


class Balancer:
    """One event loop. `place` from whoever publishes; `run` in a task of its own.

    Attributes:
        placement: in force; None before the first `place`.
        first_epoch: of the placement that `place` makes where there is none.
        num_dropped: how often the work of a FAILED worker was given to others.
    """

    def __init__(
        self,
        shape: ModelShape,
        deployment: Deployment,
        *,
        workers: ExpertWorkers,
        publish: Callable[[], None],
        clock: Clock = SYSTEM_CLOCK,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Begin without a placement.

        Args:
            shape: of the model.
            deployment: as the run was started.
            workers: asked for counts and weights.
            publish: called when `placement` has changed by itself; it calls `place`.
            clock: for the interval.
            sleep: between two ticks, and two tries.
        """
        self.placement: Placement | None = None
        self.first_epoch = 0
        self.num_dropped = 0
        self._shape = shape
        self._deployment = deployment
        self._workers = workers
        self._publish = publish
        self._clock = clock
        self._sleep = sleep
        interval_s = deployment.roles.expert.rebalance_interval_s
        self._policy = RebalancePolicy(cooldown_s=COOLDOWN_INTERVALS * interval_s)
        self._rebalanced_s = -math.inf
        self._interval_s = interval_s
        self._window_s = interval_s or WINDOW_S
        self._window_end_s = clock.monotonic() + self._window_s
        self._load = ExpertLoad(shape) if shape.num_experts else None
        self._spread_to: tuple[int, ...] = ()
        """Ranks that the experts were planned for, and have gone to."""
        self._spread_after_s = -math.inf
        self._migrating = asyncio.Lock()
        self._joined = asyncio.Event()
        self._num_migrations = 0
        self._num_moves = 0

    # -- workers come and go --------------------------------------------------------------------

    def restore(self, placement: Placement | None) -> None:
        """Go on from what another supervisor has published; call before `place`."""
        self.placement = placement
        self._spread_to = ()
        if placement is not None and not idle_ranks(placement):
            self._spread_to = placement.expert

    def place(
        self,
        *,
        wanted: Collection[tuple[str, int]],
        ready: Collection[tuple[str, int]],
        failed: Collection[tuple[str, int]] = (),
    ) -> Placement:
        """The placement for the workers of now; the present one when it still fits.

        Args:
            wanted: (role, rank) of the workers that should run.
            ready: of those that can serve.
            failed: of those that are not started again by themselves.
        """
        current = self.placement
        self._note_dropped(current, failed)
        wanted = set(wanted) - set(failed)
        ffn = self._in_use("ffn", None if current is None else current.ffn, wanted, ready)
        expert = self._in_use("expert", None if current is None else current.expert, wanted, ready)
        if current is None:
            self._spread_to, self.placement = expert, self._first(ffn, expert)
        elif (current.ffn, current.expert) != (ffn, expert):
            self.placement = self._next(current, ffn, expert)
            if current.expert != expert:
                self._spread_to = ()
            self._spread_after_s = -math.inf
            self._joined.set()
        assert self.placement is not None, "it was made above"
        return self.placement

    def _note_dropped(self, current: Placement | None, failed: Collection[tuple[str, int]]) -> None:
        in_use = {} if current is None else {"ffn": current.ffn, "expert": current.expert}
        for role, rank in sorted(failed):
            if rank in in_use.get(role, ()):
                self.num_dropped += 1
                logger.warning("%s has failed; others get its work", worker_name(role, rank))

    @staticmethod
    def _in_use(
        role: str,
        current: tuple[int, ...] | None,
        wanted: Collection[tuple[str, int]],
        ready: Collection[tuple[str, int]],
    ) -> tuple[int, ...]:
        return ranks_in_use(
            current,
            [rank for name, rank in wanted if name == role],
            [rank for name, rank in ready if name == role],
        )

    def _first(self, ffn: tuple[int, ...], expert: tuple[int, ...]) -> Placement:
        """As the deployment says."""
        slices = expert_slices(self._deployment, self._shape) if expert else ()
        if len(slices) != len(expert):  # the state file was lost after scaling
            deployment = self._deployment.with_counts({"expert": len(expert)})
            slices = expert_slices(deployment, self._shape)
        replicas = self._replicas(len(expert))
        table = base_table(self._shape, slices, replicas)
        return Placement(epoch=self.first_epoch, ffn=ffn, expert=expert, table=table)

    def _next(self, current: Placement, ffn: tuple[int, ...], expert: tuple[int, ...]) -> Placement:
        if self._load is None or not expert:  # FFN workers only, or all are to end
            nothing: list[list[int]] = [[]] * self._shape.num_layers
            return Placement(epoch=current.epoch + 1, ffn=ffn, expert=(), table=nothing)
        return moved_to(current, ffn=ffn, expert=expert, load=self._load.prior())

    def _replicas(self, num_ranks: int) -> int:
        return self._deployment.roles.expert.replicas if num_ranks >= 2 else 0

    # -- load -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look every second, and at once when a worker has joined; until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_INTERVAL_S):
                    await self._joined.wait()
            self._joined.clear()
            if self.placement is not None and self.placement.expert:
                await self.look()

    async def look(self) -> None:
        """Count; spread the experts where ranks have come or gone, or rebalance at its time."""
        load = self._load
        if load is None:
            return
        load.add(await self._workers.reports())
        placement = self.placement
        if placement is None or not placement.expert:
            return
        now_s = self._clock.monotonic()
        is_window_over = now_s >= self._window_end_s
        if self._spread_to != placement.expert:
            if now_s >= self._spread_after_s:
                async with self._migrating:
                    await self._migrate_for(load.prior())
        elif is_window_over and self._interval_s:
            async with self._migrating:
                await self._consider(load)
        if is_window_over:
            self._window_end_s = self._clock.monotonic() + self._window_s
            load.roll()

    async def _consider(self, load: ExpertLoad) -> None:
        """Migrate if the load of the windows that are over asks for it."""
        origin, windows = self.placement, load.windows()
        if origin is None or len(origin.expert) < 2 or not windows[-1].any():
            return
        replicas = self._replicas(len(origin.expert))
        current, target = await asyncio.to_thread(plan_experts, origin, load.prior(), replicas)
        now_s = self._clock.monotonic()
        decision = decide(
            self._policy,
            since_last_s=now_s - self._rebalanced_s,
            windows=windows,
            current=current,
            target=target,
        )
        if not decision.layers:
            logger.debug("experts stay where they are: %s", decision.reason)
            return
        logger.info("rebalancing %d layers: %s", len(decision.layers), decision.reason)
        if await self._migrate(origin, current, target, decision.layers):
            self._rebalanced_s = now_s

    async def rebalance(self, report: ExpertLoadReport | None) -> None:
        """Migrate now, for the load reported or counted; returns when the experts have moved.

        Raises:
            ConfigError: there are no expert workers, or the report is of another model.
            CapacityError: some have not moved, also not after MAX_TRIES.
        """
        if self._load is None or self.placement is None or not self.placement.expert:
            raise ConfigError(
                "no expert worker serves; there is nothing to rebalance (see `xds status`)"
            )
        load = self._load.prior() if report is None else self._load.prior_of(report)
        for _ in range(MAX_TRIES):
            async with self._migrating:
                if await self._migrate_for(load):
                    return
            await self._sleep(LOOK_INTERVAL_S)
        raise CapacityError(
            f"the experts have not all moved in {MAX_TRIES} tries, as workers came, went or did "
            "not load them; look at `xds status`, then rebalance again"
        )

    # -- migration ------------------------------------------------------------------------------

    async def _migrate_for(self, load: F64) -> bool:
        """As `_migrate`, from what is in force by now; False without expert workers."""
        origin = self.placement
        if origin is None or not origin.expert:
            return False
        replicas = self._replicas(len(origin.expert))
        current, target = await asyncio.to_thread(plan_experts, origin, load, replicas)
        if not await self._migrate(origin, current, target, range(self._shape.num_layers)):
            return False
        self._spread_to = origin.expert
        return True

    async def _migrate(
        self,
        origin: Placement,
        current: ExpertPlacement,
        target: ExpertPlacement,
        layers: Sequence[int],
    ) -> bool:
        """Go from current, the experts of `origin`, to target; False when something is left.

        The caller holds the lock.
        """

        async def flip(placement: ExpertPlacement, num_moves: int) -> bool:
            nonlocal origin
            if self.placement is not origin:
                logger.info("the workers in use have changed; the migration ends here")
                return False
            origin = self.placement = with_experts(origin, placement)
            self._num_moves += num_moves
            self._publish()
            await self._sleep(TICK_INTERVAL_S)
            return True

        num_before = self._num_moves
        ranks, workers = origin.expert, self._workers
        is_done = await carry_out(
            current, target, ranks=ranks, layers=layers, workers=workers, flip=flip
        )
        num_moves = self._num_moves - num_before
        self._num_migrations += bool(num_moves)
        if not is_done:
            if self.placement is origin:
                self._spread_after_s = self._clock.monotonic() + RETRY_INTERVAL_S
            return False
        numbers = {"num_moves": num_moves, "routing_epoch": origin.epoch}
        logger.info("moved %d experts; routing epoch %d", *numbers.values(), extra=numbers)
        return True

    # -- status ---------------------------------------------------------------------------------

    def heat(self) -> ExpertHeat | None:
        """For `xds status`; None without expert workers."""
        if self._load is None or self.placement is None or not self.placement.expert:
            return None
        return expert_heat(
            self._load.recent(),
            self.placement,
            num_migrations=self._num_migrations,
            num_moves=self._num_moves,
            is_migrating=self._migrating.locked(),
        )
