"""`xdeepserve serve` in a process of its own: how demo, benchmarks and tests start it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque

from xdeepserve.errors import EngineDeadError

READY = re.compile(r"xdeepserve: serving (\S+) on (http\S+)")
STOP_TIMEOUT_S = 30.0
KEPT_LINES = 40


class ServerProcess:
    """A server on a free port; use as a context manager.

    Attributes:
        model: the name the server gives its model.
        url: where it listens.
    """

    def __init__(
        self,
        *arguments: str,
        env: dict[str, str] | None = None,
        ready_timeout_s: float = 900.0,
        show_stderr: bool = False,
    ) -> None:
        """Start and wait until the server is ready.

        Args:
            arguments: of `serve`: the model, then flags.
            env: added to this process's environment.
            ready_timeout_s: for download, packing and start.
            show_stderr: pass the server's stderr through (progress bars) instead of keeping it.

        Raises:
            EngineDeadError: it ended or was not ready in time; carries its last lines.
        """
        command = [sys.executable, "-m", "xdeepserve.launch.cli", "serve", *arguments]
        self._process = subprocess.Popen(
            [*command, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=None if show_stderr else subprocess.STDOUT,
            text=True,
            env=os.environ | (env or {}),
        )
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._ready = threading.Event()
        self.model = self.url = ""
        # The reader goes on until the end, or a full pipe would stop the server.
        self._reader = threading.Thread(target=self._read_output, name="server-output", daemon=True)
        self._reader.start()
        if not self._ready.wait(ready_timeout_s) or not self.url:
            self.stop()
            raise EngineDeadError("the server did not start; it said:\n" + "".join(self._lines))

    def _read_output(self) -> None:
        assert self._process.stdout is not None, "stdout is a pipe"
        for line in self._process.stdout:
            self._lines.append(line)
            if found := READY.search(line):
                self.model, self.url = found.groups()
                self._ready.set()
        self._ready.set()

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, for example SIGTERM to begin the drain."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        """Exit code.

        Raises:
            subprocess.TimeoutExpired: it did not end in time.
        """
        return self._process.wait(timeout_s)

    def stop(self) -> int:
        """Ask the server to end, then make it end; returns its exit code. Idempotent."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        code = self._process.wait(STOP_TIMEOUT_S)
        self._reader.join(STOP_TIMEOUT_S)
        assert self._process.stdout is not None, "stdout is a pipe"
        self._process.stdout.close()
        return code

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
