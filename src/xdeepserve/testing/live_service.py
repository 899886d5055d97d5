"""LiveRun and LiveService: a running `xds serve` with workers, seen from outside: who runs, what
is left.

For programs that do things to a service and look whether it minds: fault drills, tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.errors import (
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    EngineDeadError,
    XDeepServeError,
)
from xdeepserve.launch.process_identity import ProcessIdentity
from xdeepserve.launch.run_dir import RunDirectory, living_runs
from xdeepserve.launch.server_process import ServerProcess
from xdeepserve.launch.supervisor.client import status_of
from xdeepserve.launch.supervisor.messages import SUPERVISOR_NAME, Status

SETTLE_TIMEOUT_S: Final = 60.0
VANISH_TIMEOUT_S: Final = 15.0
POLL_S: Final = 0.02


class LiveRun:
    """Processes of one run by name. For use on one event loop."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    async def status(self) -> Status:
        """As `xds status`; asks again while the supervisor is being replaced.

        Raises:
            DeadlineExceeded: nobody answers.
        """
        deadline_s = SYSTEM_CLOCK.monotonic() + SETTLE_TIMEOUT_S
        while True:
            try:
                return await status_of(self.run)
            except (ConnectionLost, DeadlineExceeded) as exc:
                if SYSTEM_CLOCK.monotonic() > deadline_s:
                    raise DeadlineExceeded(f"no supervisor answers: {exc.message}") from exc

    async def process_of(self, name: str) -> ProcessIdentity:
        """The process of a worker, or of "supervisor".

        Raises:
            EngineDeadError: it has none at present.
        """
        process = process_in(await self.status(), name)
        if process is None:
            raise EngineDeadError(f"{name} has no process")
        return process

    async def until(self, condition: Callable[[Status], bool]) -> Status:
        """The first status from now on that fulfils the condition.

        Raises:
            DeadlineExceeded: none within SETTLE_TIMEOUT_S.
        """
        deadline_s = SYSTEM_CLOCK.monotonic() + SETTLE_TIMEOUT_S
        while SYSTEM_CLOCK.monotonic() < deadline_s:
            status = await self.status()
            if condition(status):
                return status
            await asyncio.sleep(POLL_S)
        raise DeadlineExceeded(f"the service has not settled within {SETTLE_TIMEOUT_S:g} s")

    async def until_replaced(self, name: str, former: ProcessIdentity) -> Status:
        """Wait until another process than `former` is `name` and all workers serve.

        Raises:
            EngineDeadError: a worker crashed too often.
            DeadlineExceeded: not within SETTLE_TIMEOUT_S.
        """
        return await self.until(
            lambda status: (
                process_in(status, name) not in (None, former) and status.membership.is_settled()
            )
        )

    async def scale(self, counts: Mapping[str, int]) -> None:
        """Run `xds scale` and wait for its end.

        Raises:
            XDeepServeError: it failed; carries what it said.
        """
        words = [f"{role}={count}" for role, count in counts.items()]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "xdeepserve.launch.cli", "scale", *words,
            "--run-id", self.run.run_id,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await process.communicate()
        if process.returncode != 0:
            raise XDeepServeError(f"xds scale {' '.join(words)}: {output.decode().strip()}")


class LiveService(LiveRun):
    """A LiveRun and its gateway's process."""

    def __init__(self, server: ServerProcess) -> None:
        """Find the run of `server`, which is ready.

        Raises:
            ConfigError: it has none: it serves in one process.
        """
        super().__init__(_run_of(server))
        self.server = server

    def stop(self) -> int:
        """SIGTERM to the gateway; returns its exit code."""
        return self.server.stop()

    def kill(self) -> None:
        """SIGKILL to the gateway."""
        self.server.send_signal(signal.SIGKILL)
        self.server.wait(SETTLE_TIMEOUT_S)

    async def leftovers(self) -> list[str]:
        """What is there of the run after its end; asks until it is nothing or VANISH_TIMEOUT_S."""
        deadline_s = SYSTEM_CLOCK.monotonic() + VANISH_TIMEOUT_S
        while (left := self._left()) and SYSTEM_CLOCK.monotonic() < deadline_s:
            await asyncio.sleep(POLL_S)
        return left

    def _left(self) -> list[str]:
        """Processes that have files of the run open, shared segments, the folder."""
        left = [f"process {pid}" for pid in _holders(self.run.path)]
        left += [str(path) for path in self.run.shared_segments()]
        return [*left, str(self.run.path)] if self.run.path.exists() else left


def _run_of(server: ServerProcess) -> RunDirectory:
    for run in living_runs():
        gateway = run.gateway()
        if gateway is not None and gateway.pid == server.pid:
            return run
    raise ConfigError("the server has no run directory; start it with worker counts")


def process_in(status: Status, name: str) -> ProcessIdentity | None:
    """The process of a worker, or of "supervisor"; None when it has none."""
    if name == SUPERVISOR_NAME:
        return status.supervisor
    member = status.membership.find(name)
    return None if member is None else member.process


def count_in(status: Status, number: str, name: str | None = None) -> float:
    """A number of the load that a worker reports, or of all workers together."""
    beats = status.heartbeats
    return sum(beats[each].load.get(number, 0) for each in beats if name in (None, each))


def _holders(folder: Path) -> list[int]:
    """Pids of processes with a file of `folder` open, deleted files included.

    Every process of a run holds the lock of its name, so none escapes.
    """
    prefix = f"{folder}/"
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # It ended, or is another user's.
            links = [os.readlink(link) for link in (process / "fd").iterdir()]
            if any(link.startswith(prefix) for link in links):
                found.append(int(process.name))
    return found
