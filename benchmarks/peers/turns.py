"""Processes that run while it is their turn: idle ones take nothing from the others."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any, Final

STOP_TIMEOUT_S: Final = 20.0


class TurnProcess:
    """A process group of its own. Runs from the start until the first turn has ended."""

    def __init__(
        self, argv: tuple[str, ...], env: Mapping[str, str], log: IO[str], **popen: Any
    ) -> None:
        """Start it; stderr goes to `log`. `popen`: more arguments of subprocess.Popen."""
        self.process = subprocess.Popen(
            argv, stderr=log, env=env, text=True, start_new_session=True, **popen
        )

    @property
    def pid(self) -> int:
        """Its id, and that of its group."""
        return self.process.pid

    @contextmanager
    def turn(self) -> Iterator[None]:
        """It runs inside and stands still afterwards."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def stop(self) -> None:
        """End it, first gently. Idempotent."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT_S)
        self._signal(signal.SIGKILL)  # what it left of its group, too
        self.process.wait(STOP_TIMEOUT_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
