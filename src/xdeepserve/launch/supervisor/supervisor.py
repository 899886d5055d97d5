"""Supervisor: the workers that should run, the slots that keep them running, and who is told.

    Scale -> plan -> slots (one task each) -> on_change -> epoch + 1 -> state.json, subscribers

Thread: one event loop. The state file always holds the membership that was published last.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Awaitable
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import msgspec

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.control import ControlServer, Peer
from xdeepserve.eplb import ExpertLoadReport
from xdeepserve.errors import CapacityError, DeadlineExceeded
from xdeepserve.launch.background import Background
from xdeepserve.launch.cores import wants_pinning
from xdeepserve.launch.fabric import check_scaling
from xdeepserve.launch.plan import WorkerSpec, counts_of, resolve
from xdeepserve.launch.process_identity import ProcessIdentity
from xdeepserve.launch.run_dir import RunDirectory
from xdeepserve.launch.service import ServiceConfig
from xdeepserve.launch.supervisor.balancer import Balancer
from xdeepserve.launch.supervisor.expert_calls import ExpertCalls
from xdeepserve.launch.supervisor.messages import (
    SUPERVISOR_NAME,
    GetStatus,
    Member,
    Membership,
    Rebalance,
    SavedState,
    Scale,
    Status,
    StopAll,
    Subscribe,
    SupervisorReply,
    SupervisorRequest,
    WorkerState,
)
from xdeepserve.launch.supervisor.pinning import choosing_cores, pinned
from xdeepserve.launch.supervisor.worker_slot import WorkerSlot

logger = logging.getLogger(__name__)

END_MARGIN_S: Final = 2.0
"""Beyond the deadlines of a worker's end, for a loop that is late."""


class Supervisor:
    """Supervises the workers of one run; `run` until it is stopped or cancelled."""

    def __init__(self, run: RunDirectory, service: ServiceConfig) -> None:
        self._run = run
        self._service = service
        self._config = service.deployment.supervision
        self._slots: dict[str, WorkerSlot] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._incarnations: dict[str, int] = {}
        self._wanted: dict[str, WorkerSpec] = {}
        self._counts: dict[str, int] = {}
        self._membership = Membership(epoch=0, run_id=run.run_id, counts={}, members=())
        self._published = asyncio.Event()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._background = Background()
        self._is_stopping = False
        self._balancer = Balancer(
            service.shape,
            service.deployment,
            workers=ExpertCalls(self._slots),
            publish=self._publish,
        )

    async def run(self) -> None:
        """Start or adopt the workers, then serve until all are stopped.

        Cancelled, it lets go of the workers, which go on.

        Raises:
            ConfigError: the plan cannot be resolved on this machine.
            EngineDeadError: a task failed, or a worker cannot be ended.
        """
        server = ControlServer(
            self._run.socket_path(SUPERVISOR_NAME), self._answer, requests=SupervisorRequest
        )
        try:
            self._restore()
            await server.start()
            # After a bug of ours a new supervisor goes on from what was published last.
            self._background.start(self._balancer.run(), name="the balancer")
            await self._background.guard(self._ended)
        finally:
            await server.close()
            await self._background.close()
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def begin_stop(self, *, drain_timeout_s: float) -> Membership:
        """Begin to end all workers; `run` returns when they have.

        Args:
            drain_timeout_s: 0 = without draining, and killed if they do not obey.
        """
        self._is_stopping = True
        self._background.start(self._stop(drain_timeout_s), name="stopping the workers")
        return self._membership

    async def _stop(self, drain_timeout_s: float) -> None:
        self._wanted = {}
        for slot in self._slots.values():
            slot.leave(drain_timeout_s=drain_timeout_s)
        if drain_timeout_s == 0 and not await self._all_ended(self._config.stop_timeout_s):
            for slot in self._slots.values():
                slot.kill()  # Those that drain since before.
        if not await self._all_ended(drain_timeout_s + self._longest_end_s()):
            raise DeadlineExceeded(f"workers that cannot be ended: {', '.join(self._tasks)}")
        if not self._ended.done():
            self._ended.set_result(None)

    async def _all_ended(self, timeout_s: float) -> bool:
        """Whether no worker is left within the timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._tasks:
                    await asyncio.wait(self._tasks.values())
        except TimeoutError:
            return False
        return True

    def _longest_end_s(self) -> float:
        """Beyond its drain: a worker is asked, and waited for after Drain, SIGTERM and SIGKILL."""
        return 2 * self._config.freeze_timeout_s + 3 * self._config.stop_timeout_s + END_MARGIN_S

    # -- what should run ------------------------------------------------------------------------

    def _restore(self) -> None:
        """Take over from the state file, else from who runs, else begin as deployed."""
        saved = self._load_state()
        counts = self._service.deployment.counts()
        if saved is not None:
            self._membership = saved.membership
            self._balancer.restore(saved.membership.placement)
            self._incarnations = dict(saved.incarnations)
            counts = saved.membership.counts
        elif workers := self._former_workers():
            counts |= counts_of([name for name, holder in workers.items() if holder is not None])
            self._raise_epochs()
            logger.error("%s is lost; going on with %s", self._run.state_path, counts)
        with self._choosing_cores():
            self._adopt_plan(counts)
            for member in self._membership.members:
                self._start_slot(member)
            self._reconcile()
            self._publish()

    def _choosing_cores(self) -> AbstractContextManager[None]:
        is_wanted = wants_pinning(self._service.deployment)
        return choosing_cores(self._run) if is_wanted else nullcontext()

    def _load_state(self) -> SavedState | None:
        try:
            data = self._run.state_path.read_bytes()
            return msgspec.json.decode(data, type=SavedState)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as exc:
            logger.error("%s is damaged: %s", self._run.state_path, exc)
            return None

    def _former_workers(self) -> dict[str, ProcessIdentity | None]:
        """Who holds the lock of each worker that ever was; empty when the run begins."""
        holders = self._run.lock_holders()
        holders.pop(SUPERVISOR_NAME, None)
        return holders

    def _raise_epochs(self) -> None:
        """Above all that may have been published: there are never 1000 in a second."""
        epoch = int(SYSTEM_CLOCK.wall() * 1000)
        self._membership = msgspec.structs.replace(self._membership, epoch=epoch)
        self._balancer.first_epoch = epoch

    def _adopt_plan(self, counts: dict[str, int]) -> None:
        """Want the workers of these counts; raises ConfigError and changes nothing if wrong."""
        check_scaling(self._service.deployment, counts)
        deployment = self._service.deployment.with_counts(counts)
        usable = os.sched_getaffinity(0)
        plan = resolve(deployment, self._service.shape, usable_cores=usable)
        workers = pinned(plan.workers, self._run, self._service.deployment, self._membership)
        self._wanted = {spec.name: spec for spec in workers}
        self._counts = plan.counts()

    def _reconcile(self) -> None:
        """Start what is missing, let go what is not wanted."""
        for name, slot in self._slots.items():
            if name in self._wanted:
                slot.update_spec(self._wanted[name])
            else:
                slot.leave(drain_timeout_s=self._config.drain_timeout_s)
        for name, spec in self._wanted.items():
            if name not in self._slots:
                self._start_slot(self._new_member(spec))

    def _new_member(self, spec: WorkerSpec) -> Member:
        return Member(
            spec=spec,
            state=WorkerState.STARTING,
            incarnation=self._incarnations.get(spec.name, 0),
            num_restarts=0,
            socket=str(self._run.socket_path(spec.name)),
        )

    def _start_slot(self, member: Member) -> None:
        name = member.name
        slot = WorkerSlot(member, run=self._run, config=self._config, on_change=self._publish)
        self._slots[name] = slot
        task = self._tasks[name] = asyncio.create_task(slot.run(), name=name)
        task.add_done_callback(lambda task: self._on_slot_end(name, task))

    def _on_slot_end(self, name: str, task: asyncio.Task[None]) -> None:
        """A worker has left: forget it, and start it anew if it is wanted again by now."""
        if task.cancelled():
            return
        del self._slots[name], self._tasks[name]
        if (error := task.exception()) is not None:
            # A bug of ours. A new supervisor adopts the workers and goes on.
            if not self._ended.done():
                self._ended.set_exception(error)
            return
        self._run.segment_path(name).unlink(missing_ok=True)  # Killed, it could not do so.
        self._reconcile()
        self._publish()

    # -- who is told ----------------------------------------------------------------------------

    def _publish(self) -> None:
        """The next epoch: into the state file first, then to the subscribers."""
        members = tuple(slot.member for slot in self._slots.values())
        for member in members:
            self._incarnations[member.name] = member.incarnation
        self._membership = Membership(
            epoch=self._membership.epoch + 1,
            run_id=self._run.run_id,
            counts=self._counts,
            members=tuple(sorted(members, key=lambda m: (m.spec.role, m.spec.rank))),
            placement=self._balancer.place(
                wanted=[(spec.role, spec.rank) for spec in self._wanted.values()],
                ready=[(m.spec.role, m.spec.rank) for m in members if m.can_serve],
                failed=[
                    (m.spec.role, m.spec.rank) for m in members if m.state is WorkerState.FAILED
                ],
            ),
        )
        state = SavedState(membership=self._membership, incarnations=self._incarnations)
        self._run.write(self._run.state_path, state)
        self._published.set()
        self._published = asyncio.Event()

    async def _subscribe(self) -> AsyncGenerator[SupervisorReply, None]:
        while True:
            published = self._published
            yield self._membership
            await published.wait()

    def _answer(
        self, request: SupervisorRequest, peer: Peer
    ) -> Awaitable[SupervisorReply] | AsyncGenerator[SupervisorReply, None]:
        match request:
            case Subscribe():
                return self._subscribe()
            case GetStatus():
                return self._status()
            case Scale(counts):
                return self._scale(counts)
            case Rebalance(load):
                return self._rebalance(load)
            case StopAll(drain_timeout_s):
                return self._stop_all(drain_timeout_s)

    async def _status(self) -> Status:
        beats = {name: slot.heartbeat for name, slot in self._slots.items()}
        return Status(
            membership=self._membership,
            supervisor=ProcessIdentity.own(),
            heartbeats={name: beat for name, beat in beats.items() if beat is not None},
            expert_heat=self._balancer.heat(),
            num_dropped=self._balancer.num_dropped,
        )

    async def _rebalance(self, load: ExpertLoadReport | None) -> Membership:
        await self._balancer.rebalance(load)
        return self._membership

    async def _stop_all(self, drain_timeout_s: float) -> Membership:
        return self.begin_stop(drain_timeout_s=drain_timeout_s)

    async def _scale(self, counts: dict[str, int]) -> Membership:
        if self._is_stopping:
            raise CapacityError("the service is stopping; it cannot be scaled")
        with self._choosing_cores():
            self._adopt_plan({**self._counts, **counts})
            logger.info("scaling to %s", self._counts)
            for name in self._wanted:
                if (slot := self._slots.get(name)) is not None:
                    slot.retry()
            self._reconcile()
            self._publish()
        return self._membership
