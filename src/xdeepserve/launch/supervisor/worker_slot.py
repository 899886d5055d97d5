"""WorkerSlot: keeps one named worker running: start or adopt, watch, restart, drain.

spawn/adopt -> STARTING -> READY <-> BUSY, FROZEN --lost: SIGKILL--+
    ^                        |                                     v
    |                        +-- leave: DRAINING -> SIGTERM -> SIGKILL -> gone
    +---- BACKOFF <---- ended by itself, killed by us or by others
             +-- crash-loop limit: FAILED --retry, failed_retry_s--> spawn
             +-- wrong configuration: FAILED --retry--> spawn
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable
from typing import Any, Final

import msgspec

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.control import ControlClient
from xdeepserve.errors import XDeepServeError
from xdeepserve.launch.deployment import SupervisionConfig
from xdeepserve.launch.failure_note import read_note
from xdeepserve.launch.plan import WorkerSpec
from xdeepserve.launch.process_identity import ProcessIdentity
from xdeepserve.launch.run_dir import RunDirectory, lock_holder
from xdeepserve.launch.supervisor.child import Child, describe_exit
from xdeepserve.launch.supervisor.health import HealthTracker, Observation
from xdeepserve.launch.supervisor.messages import Member, WorkerState
from xdeepserve.launch.supervisor.restart_policy import RestartPolicy
from xdeepserve.launch.worker.exit_codes import EXIT_CONFIG, EXIT_NAME_TAKEN
from xdeepserve.launch.worker.messages import (
    Drain,
    GetHeartbeat,
    HeartbeatReply,
    WorkerReply,
    WorkerRequest,
)
from xdeepserve.messages import Heartbeat

logger = logging.getLogger(__name__)

WORKER_MODULE: Final = "xdeepserve.launch.worker"

START_POLL_S: Final = 0.05
"""Between two questions whether a worker is ready."""

STARTING_BEAT: Final = Heartbeat(progress=0, is_idle=True)
"""A worker that starts need not answer yet, unless it is stopped."""


class WorkerSlot:
    """One worker by name. `run` in a task of its own; the other methods from the same loop."""

    def __init__(
        self,
        member: Member,
        *,
        run: RunDirectory,
        config: SupervisionConfig,
        on_change: Callable[[], None],
    ) -> None:
        """Make a slot; `run` starts or adopts its worker.

        Args:
            member: what is known: of a new worker its spec and latest incarnation, of a running one
                also its process, of one that has ended how often and what was to follow.
            on_change: called whenever `member` has changed.
        """
        self.member = member
        self.heartbeat: Heartbeat | None = None
        self._run = run
        self._config = config
        self._on_change = on_change
        self._policy = RestartPolicy(
            config, num_crashes=member.num_crashes, now_s=SYSTEM_CLOCK.monotonic()
        )
        self._child: Child | None = None
        self._client: ControlClient | None = None
        self._leave = asyncio.Event()
        self._retry = asyncio.Event()
        self._drain_timeout_s = 0.0
        self._lost_reason: str | None = None
        self._has_started = False

    def update_spec(self, spec: WorkerSpec) -> None:
        """Take note of a new plan; the running process is not disturbed."""
        if spec != self.member.spec:
            self.member = msgspec.structs.replace(self.member, spec=spec)

    def leave(self, *, drain_timeout_s: float) -> None:
        """Let the worker end; `run` returns when it has. 0 = without draining."""
        if not self._leave.is_set():
            self._drain_timeout_s = drain_timeout_s
            self._leave.set()

    def retry(self) -> None:
        """Start a FAILED worker again."""
        if self.member.state is WorkerState.FAILED:
            self._set(WorkerState.BACKOFF)
        self._retry.set()

    def kill(self) -> None:
        """End the process now."""
        if self._child is not None:
            self._child.send_signal(signal.SIGKILL)

    async def run(self) -> None:
        """Keep the worker running until `leave`. Cancelled, it lets go of the process."""
        child = self._adopt(self.member.process)
        try:
            if child is None and self.member.state in (WorkerState.BACKOFF, WorkerState.FAILED):
                await self._pause()  # as the supervisor before would have done
            while child is not None or not self._leave.is_set():
                child = self._child = child or await self._spawn()
                if child is None:
                    continue
                code, ended = await self._watch(child), child.identity
                child = self._child = None
                if code == EXIT_NAME_TAKEN:
                    child = self._adopt(None)
                elif not self._leave.is_set():
                    await self._back_off(self._reason(ended, code), code)
        finally:
            await self._disconnect()
            if self._child is not None:
                self._child.forget()

    # -- starting and ending --------------------------------------------------------------------

    async def _spawn(self) -> Child | None:
        """Start the next incarnation; None after a wait when the machine has no room for it."""
        incarnation = self.member.incarnation + 1
        spec = msgspec.json.encode(self.member.spec).decode()
        command = [sys.executable, "-m", WORKER_MODULE, str(self._run.path), spec, str(incarnation)]
        try:
            child = Child.spawn(command)
        except OSError as exc:
            await self._wait_for_room(exc)
            return None
        self._has_started = False
        self._set(
            WorkerState.STARTING,
            incarnation=incarnation,
            process=child.identity,
            started_at_s=SYSTEM_CLOCK.wall(),
        )
        return child

    def _adopt(self, recorded: ProcessIdentity | None) -> Child | None:
        """The process that has this name already: as recorded, else as its lock file says."""
        child = None if recorded is None else Child.adopt(recorded)
        if child is None:
            holder = lock_holder(self._run.lock_path(self.member.name))
            child = None if holder is None else Child.adopt(holder)
        if child is None:
            return None
        logger.info("%s runs already as process %d", self.member.name, child.identity.pid)
        if child.identity == recorded:
            self._has_started = self.member.state is not WorkerState.STARTING
        else:
            self._has_started = False
            self._set(
                WorkerState.STARTING,
                process=child.identity,
                started_at_s=child.identity.started_at_s,
            )
        return child

    def _reason(self, ended: ProcessIdentity, code: int | None) -> str:
        """Why the process has ended: its own words, where it could say them."""
        if self._lost_reason is not None:
            return self._lost_reason
        note = read_note(self._run, self.member.name, ended.pid)
        if not note and self.heartbeat is not None:
            note = self.heartbeat.error or ""
        return f"{describe_exit(code)}: {note}" if note else describe_exit(code)

    async def _back_off(self, reason: str, code: int | None) -> None:
        """Wait before the next start: for a while, for long, or for `retry` alone."""
        state = WorkerState.FAILED
        if code == EXIT_CONFIG:
            self._policy.forget()
            next_step = "gives up, as it would end so again"
        elif (wait_s := self._policy.next_wait_s(SYSTEM_CLOCK.monotonic())) is None:
            crashes = "1 crash" if (n := self._policy.num_crashes) == 1 else f"{n} crashes"
            next_step = f"gives up after {crashes}; next try in {self._config.failed_retry_s:g} s"
        else:
            state, next_step = WorkerState.BACKOFF, f"next start in {wait_s:g} s"
        logger.warning("%s: %s; %s", self.member.name, reason, next_step)
        self.heartbeat = None
        self._set(
            state,
            process=None,
            reason=f"{reason}; {next_step}" if state is WorkerState.FAILED else reason,
            num_restarts=self.member.num_restarts + 1,
            num_crashes=self._policy.num_crashes,
        )
        await self._pause()

    async def _pause(self) -> None:
        """Wait for the next start, in BACKOFF or FAILED."""
        wait_s = self._policy.wait_s
        if self.member.state is WorkerState.FAILED:
            # Who has not crashed too often is configured wrongly.
            wait_s = self._config.failed_retry_s if self._policy.has_given_up else None
        self._retry.clear()
        await self._first_of(self._leave, self._retry, timeout_s=wait_s)
        if self._retry.is_set():
            self._forgive()

    def _forgive(self) -> None:
        """Crashes so far count no more."""
        self._policy.forget()
        self._set(self.member.state, num_crashes=0)

    async def _wait_for_room(self, error: OSError) -> None:
        """The machine is short of processes, memory or descriptors: no fault of the worker."""
        wait_s = self._config.backoff_max_s
        reason = f"cannot be started: {error.strerror or error}"
        logger.warning("%s: %s; next try in %g s", self.member.name, reason, wait_s)
        self._set(WorkerState.BACKOFF, process=None, reason=reason)
        self._retry.clear()
        await self._first_of(self._leave, self._retry, timeout_s=wait_s)

    async def _end(self, child: Child) -> None:
        """Drain, SIGTERM, SIGKILL: each has its time."""
        self._set(WorkerState.DRAINING)
        if self._drain_timeout_s > 0 and await self._answers():
            await self._ask(Drain(self._drain_timeout_s), self._drain_timeout_s + 1.0)
            if await child.wait(timeout_s=self._config.stop_timeout_s):
                return
        child.send_signal(signal.SIGTERM)
        if not await child.wait(timeout_s=self._config.stop_timeout_s):
            logger.warning("%s did not end after SIGTERM; killing it", self.member.name)
            child.send_signal(signal.SIGKILL)
            # Whoever hangs in the kernel is tried again.
            await child.wait(timeout_s=self._config.stop_timeout_s)

    # -- watching -------------------------------------------------------------------------------

    async def _watch(self, child: Child) -> int | None:
        """Observe the process until it has ended; returns its exit code."""
        await self._disconnect()
        self._lost_reason = None
        interval_s = self._config.heartbeat_interval_s
        started_s = unready_s = SYSTEM_CLOCK.monotonic()
        health = HealthTracker(self._config, started_s)
        while not await self._ended(child, interval_s if self._has_started else START_POLL_S):
            reply = await self._ask(GetHeartbeat(), 2 * interval_s)
            now_s = SYSTEM_CLOCK.monotonic()
            if not self._has_started and isinstance(reply, HeartbeatReply) and reply.is_ready:
                self._become_ready(reply)
            self._observe(child, health, reply, now_s)
            if self.member.state is not WorkerState.READY:
                unready_s = now_s
            elif now_s - unready_s >= self._config.stable_after_s:
                self._forgive()
            if not self._has_started and now_s - started_s > self._config.start_timeout_s:
                self._lose(child, f"not ready after {self._config.start_timeout_s:g} s")
        return child.exited.result()

    async def _ended(self, child: Child, interval_s: float) -> bool:
        """Wait between two heartbeats, or end the process when it is to leave."""
        leave = asyncio.create_task(self._leave.wait())
        waits: set[asyncio.Future[Any]] = {child.exited, leave}
        await asyncio.wait(waits, timeout=interval_s, return_when=asyncio.FIRST_COMPLETED)
        leave.cancel()
        if self._leave.is_set() and not child.exited.done():
            await self._end(child)
        return child.exited.done()

    def _become_ready(self, reply: HeartbeatReply) -> None:
        self._has_started = True
        incarnation = max(reply.incarnation, self.member.incarnation)
        self._set(WorkerState.READY, incarnation=incarnation, reason="")

    def _observe(
        self, child: Child, health: HealthTracker, reply: WorkerReply | None, now_s: float
    ) -> None:
        sample = child.sample()
        if sample is None or sample.is_dead:
            return  # The next round sees its end.
        beat = reply.heartbeat if isinstance(reply, HeartbeatReply) else None
        self.heartbeat = beat or self.heartbeat
        if beat is None and not self._has_started and not sample.is_stopped:
            beat = STARTING_BEAT
        state = health.observe(
            Observation(
                now_s=now_s, heartbeat=beat, cpu_s=sample.cpu_s, is_stopped=sample.is_stopped
            )
        )
        is_shown = self._has_started or state is WorkerState.FROZEN
        self._set(state if is_shown else WorkerState.STARTING)
        if health.is_lost:
            self._lose(child, f"{state} for too long")

    def _lose(self, child: Child, reason: str) -> None:
        """Kill the process; until it has ended, its state stays as it was observed."""
        logger.warning("%s: %s; killing process %d", self.member.name, reason, child.identity.pid)
        self._lost_reason = reason
        self._set(self.member.state, reason=reason)
        child.send_signal(signal.SIGKILL)

    async def ask(self, request: WorkerRequest, *, timeout_s: float) -> WorkerReply | None:
        """Call the worker beside its supervision; None when it does not answer."""
        return None if self._client is None else await self._ask(request, timeout_s)

    async def _ask(self, request: WorkerRequest, timeout_s: float) -> WorkerReply | None:
        """Call the worker; None when it does not answer."""
        try:
            if self._client is None:
                path = self._run.control_path(self.member.name)
                self._client = await ControlClient.connect(
                    path, replies=WorkerReply, timeout_s=timeout_s
                )
            reply: WorkerReply = await self._client.call(request, timeout_s=timeout_s)
            return reply
        except XDeepServeError as exc:
            logger.debug("%s: %s", self.member.name, exc.message)
            if self._client is not None and not self._client.is_connected:
                await self._disconnect()
            return None

    async def _answers(self) -> bool:
        return await self._ask(GetHeartbeat(), self._config.freeze_timeout_s) is not None

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    def _set(self, state: WorkerState, **changes: object) -> None:
        changed = msgspec.structs.replace(self.member, state=state, **changes)
        if changed != self.member:
            self.member = changed
            self._on_change()

    @staticmethod
    async def _first_of(*events: asyncio.Event, timeout_s: float | None) -> None:
        tasks = {asyncio.create_task(event.wait()) for event in events}
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
