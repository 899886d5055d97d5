"""Child: a running worker process, started by us or by a supervisor before us."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Final

from xdeepserve.launch.process_identity import (
    ProcessIdentity,
    ProcessSample,
    sample_process,
    send_signal,
)

STDERR: Final = 2


class Child:
    """Watches the end of a process through its pidfd; belongs to one event loop.

    Attributes:
        identity: of the process.
        exited: done when it has ended: its exit code (negative: signal), or None where only its
            parent could know it.
    """

    def __init__(
        self, identity: ProcessIdentity, pidfd: int, popen: subprocess.Popen[bytes] | None
    ) -> None:
        self.identity = identity
        self._pidfd = pidfd
        self._popen = popen
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int | None] = self._loop.create_future()
        self._loop.add_reader(pidfd, self._on_exit)

    @classmethod
    def spawn(cls, command: Sequence[str]) -> Child:
        """Start a process that outlives us: its own session, our stderr.

        Raises:
            OSError: there is no room for another process, or none of its descriptors here.
        """
        popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=STDERR,
            start_new_session=True,
        )
        try:
            # Not reaped before `_on_exit`, so the pid is its own until then.
            return cls(ProcessIdentity.of(popen.pid), os.pidfd_open(popen.pid), popen)
        except OSError:
            popen.kill()
            popen.wait()
            raise

    @classmethod
    def adopt(cls, identity: ProcessIdentity) -> Child | None:
        """Watch a running process; None when it has ended."""
        pidfd = identity.open_pidfd()
        return None if pidfd is None else cls(identity, pidfd, None)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; does nothing when it has ended."""
        if not self.exited.done():
            send_signal(self._pidfd, number)

    def sample(self) -> ProcessSample | None:
        """Its CPU time and state; None when it has ended."""
        return None if self.exited.done() else sample_process(self.identity.pid)

    async def wait(self, *, timeout_s: float) -> bool:
        """Whether it ended within the timeout."""
        done, _ = await asyncio.wait({self.exited}, timeout=timeout_s)
        return bool(done)

    def forget(self) -> None:
        """Stop watching; the process goes on. Idempotent."""
        if not self.exited.done():
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self.exited.cancel()
            if self._popen is not None:
                self._popen.returncode = 0  # It is not ours to reap any more.

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.exited.set_result(None if self._popen is None else self._popen.wait())


def describe_exit(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "ended"
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # Most real-time signals have no name.
        return f"killed by signal {-code}"
