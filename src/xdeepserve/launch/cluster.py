"""Cluster: the gateway's side of a disaggregated service.

    lease --> [ supervisor process, restarted when it ends ] --membership--> listener

Holds the lease of the run: when this process ends, supervisor and workers end too. Used on one
event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Mapping
from typing import Final

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.control import ControlClient
from xdeepserve.errors import ConnectionLost, DeadlineExceeded, EngineDeadError, XDeepServeError
from xdeepserve.launch.background import Background
from xdeepserve.launch.failure_note import read_note
from xdeepserve.launch.roster import MemberListener, Roster
from xdeepserve.launch.run_dir import create_run
from xdeepserve.launch.service import ServiceConfig
from xdeepserve.launch.supervisor.child import Child, describe_exit
from xdeepserve.launch.supervisor.client import connect_supervisor, scale_run, status_of
from xdeepserve.launch.supervisor.messages import (
    SUPERVISOR_NAME,
    Membership,
    Status,
    StopAll,
    Subscribe,
)
from xdeepserve.launch.supervisor.restart_policy import RestartPolicy

logger = logging.getLogger(__name__)

SUPERVISOR_MODULE: Final = "xdeepserve.launch.supervisor"
RECONNECT_S: Final = 0.05
RETRY_S: Final = 0.2
PING_INTERVAL_S: Final = 1.0
PING_TIMEOUT_S: Final = 5.0
SILENCE_TIMEOUT_S: Final = 30.0
"""How long a supervisor may run without telling the membership: it starts, or it ends."""
SILENCE_TICKS: Final = 8
"""In which that time is counted, so that a pause of this process blames nobody."""
STOP_MARGIN_S: Final = 20.0
"""Beyond the drain: for SIGTERM, SIGKILL and the supervisor's own end."""


class Cluster:
    """One run: its directory, its supervisor and what is known of its workers.

    Attributes:
        run: the run directory.
        membership: the latest; None before the first.
        background: tasks without which the service cannot go on; ended by `stop`.
    """

    def __init__(
        self,
        service: ServiceConfig,
        listener: MemberListener,
        *,
        background: Background | None = None,
    ) -> None:
        """Make the run directory and take its lease.

        Args:
            service: what is served.
            listener: told of the DP groups.
            background: where the listener's own tasks run; None = it has none.

        Raises:
            ConfigError: it cannot be made.
        """
        self.run, self._lease = create_run()
        service.save(self.run)
        self.membership: Membership | None = None
        self._service = service
        self._roster = Roster(listener)
        self._is_stopping = False
        self._supervisor_error: str | None = None
        self._news = asyncio.Condition()
        self._supervisor: Child | None = None
        # Process of the supervisor that is being followed.
        self._followed_pid: int | None = None
        self.background = background or Background()

    async def start(self, *, timeout_s: float) -> None:
        """Start the supervisor; return when all workers can serve and the listener knows them.

        Raises:
            EngineDeadError: a worker or the supervisor does not start, or a task failed.
            DeadlineExceeded: not ready in time.
        """
        self.background.start(self._keep_supervisor(), name="keeping the supervisor")
        self.background.start(self._follow(), name="following the membership")
        self.background.start(self._tell_listener(), name="telling the router")
        try:
            async with asyncio.timeout(timeout_s):
                await self.background.guard(self._until_complete())
        except TimeoutError:
            raise DeadlineExceeded(
                f"the workers are not ready after {timeout_s:g} s: {self._describe()}"
            ) from None

    async def _until_complete(self) -> None:
        async with self._news:
            await self._news.wait_for(self._is_complete)

    async def scale(self, counts: Mapping[str, int]) -> Membership:
        """Begin to run that many workers of each named role.

        Raises:
            ConfigError: unknown role, or counts the model or machine does not allow.
            ConnectionLost: there is no supervisor, also not after a while.
        """
        return await scale_run(self.run, counts)

    async def status(self) -> Status:
        """Membership, and the latest heartbeats.

        Raises:
            ConnectionLost: there is no supervisor, also not after a while.
        """
        return await status_of(self.run)

    async def stop(self, *, drain_timeout_s: float) -> None:
        """Drain and end workers and supervisor, remove the run directory. Idempotent."""
        try:
            await self._stop_supervisor(drain_timeout_s)
        except (XDeepServeError, TimeoutError) as exc:
            logger.warning("the supervisor did not stop the workers (%s); killing them", exc)
        finally:
            await self.background.close()
            if self._supervisor is not None:
                self._supervisor.forget()
            self.run.kill_processes()
            self.run.remove()
            self._lease.release()

    async def _stop_supervisor(self, drain_timeout_s: float) -> None:
        """Have everything drained and ended, by a second supervisor if the first one dies."""
        if self._supervisor is None:
            return
        if self._supervisor_error is not None:
            raise EngineDeadError(f"it does not start: {self._supervisor_error}")
        self._is_stopping = True
        async with asyncio.timeout(drain_timeout_s + STOP_MARGIN_S):
            while not await self._try_stop(drain_timeout_s):
                await asyncio.sleep(RECONNECT_S)

    async def _try_stop(self, drain_timeout_s: float) -> bool:
        """Tell the present supervisor to stop all; whether it did, and did not die before."""
        assert self._supervisor is not None, "the caller has seen to it"
        exited = asyncio.shield(self._supervisor.exited)
        with contextlib.suppress(ConnectionLost):
            async with connect_supervisor(self.run) as client:
                await client.call(StopAll(drain_timeout_s), timeout_s=STOP_MARGIN_S)
            await exited
        return exited.done() and exited.result() == 0

    # -- the supervisor -------------------------------------------------------------------------

    async def _keep_supervisor(self) -> None:
        """Start the supervisor, and start it again whenever it ends."""
        policy = RestartPolicy(self._service.deployment.supervision)
        command = [sys.executable, "-m", SUPERVISOR_MODULE, str(self.run.path)]
        while True:
            note = ""
            try:
                child = self._supervisor = Child.spawn(command)
            except OSError as exc:  # no room for another process; there may be some later
                reason = note = f"cannot be started: {exc.strerror or exc}"
            else:
                code = await self._end_of(child)
                if self._is_stopping and code == 0:
                    return
                reason = describe_exit(code)
                note = read_note(self.run, SUPERVISOR_NAME, child.identity.pid)
            wait_s = policy.next_wait_s(SYSTEM_CLOCK.monotonic())
            if wait_s is None:
                await self._give_up_start(note or f"it {reason}; its log says why")
                # The workers go on without a supervisor, so there is always another try.
                wait_s = self._service.deployment.supervision.backoff_max_s
            logger.warning("the supervisor %s; next start in %g s", reason, wait_s)
            await asyncio.sleep(wait_s)

    async def _end_of(self, supervisor: Child) -> int | None:
        """Its exit code. One that cannot be followed, and so not be pinged, is killed in time."""
        num_silent = 0
        while not await supervisor.wait(timeout_s=SILENCE_TIMEOUT_S / SILENCE_TICKS):
            is_followed = self._followed_pid == supervisor.identity.pid
            num_silent = 0 if is_followed else num_silent + 1
            if num_silent >= SILENCE_TICKS:
                logger.warning("the supervisor does not tell the membership; killing it")
                supervisor.send_signal(signal.SIGKILL)
        return supervisor.exited.result()

    async def _give_up_start(self, error: str) -> None:
        """Who waits for the start of the service need not wait any longer."""
        async with self._news:
            self._supervisor_error = error
            self._news.notify_all()

    async def _follow(self) -> None:
        """Keep `membership` up to date, across supervisors."""
        while True:
            with contextlib.suppress(XDeepServeError):
                async with connect_supervisor(self.run) as client:
                    pinging = asyncio.create_task(self._ping_supervisor(client))
                    try:
                        async for membership in client.stream(Subscribe(), item_timeout_s=None):
                            self._followed_pid = client.peer.pid
                            await self._take(membership)
                    finally:
                        self._followed_pid = None
                        pinging.cancel()
            await asyncio.sleep(RECONNECT_S)

    async def _take(self, membership: Membership) -> None:
        self._supervisor_error = None
        async with self._news:
            self.membership = membership
            self._news.notify_all()

    async def _ping_supervisor(self, client: ControlClient) -> None:
        """Kill a supervisor that hangs; a new one takes over."""
        try:
            while True:
                await client.ping(timeout_s=PING_TIMEOUT_S)
                await asyncio.sleep(PING_INTERVAL_S)
        except DeadlineExceeded:
            logger.warning("the supervisor does not answer; killing it")
            if self._supervisor is not None:
                self._supervisor.send_signal(signal.SIGKILL)
        except XDeepServeError:
            return  # Its connection is gone: `_follow` connects again.

    # -- the members ----------------------------------------------------------------------------

    def _is_complete(self) -> bool:
        """Whether all wanted workers can serve and the listener knows every DP group.

        Raises:
            EngineDeadError: one of them failed for good.
        """
        membership = self.membership
        if membership is None:
            if self._supervisor_error is not None:
                raise EngineDeadError(f"the supervisor does not start: {self._supervisor_error}")
            return False
        groups = {member.name for member in membership.members if member.spec.role == "attention"}
        return membership.is_settled() and groups == self._roster.names

    def _describe(self) -> str:
        if self.membership is None:
            return "the supervisor has not answered"
        states = (f"{m.name} {m.state} {m.reason}".strip() for m in self.membership.members)
        return ", ".join(states)

    async def _tell_listener(self) -> None:
        """Bring the listener up to date with each membership; try again where it could not."""
        while True:
            async with self._news:
                await self._news.wait_for(self._is_listener_behind)
            assert self.membership is not None, "the listener cannot be behind nothing"
            try:
                await self._roster.update(self.membership)
            except XDeepServeError as exc:
                logger.warning("a worker could not be joined: %s", exc.message)
                await asyncio.sleep(RETRY_S)
            async with self._news:
                self._news.notify_all()

    def _is_listener_behind(self) -> bool:
        return self.membership is not None and self.membership.epoch != self._roster.epoch
