"""Starts `xdeepserve serve` as a user would and waits for the line that says where it listens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections import deque

READY = re.compile(r"xdeepserve: serving (\S+) on (http\S+)")
STOP_TIMEOUT_S = 30.0
KEPT_LINES = 40


class ServerProcess:
    """A server on a free port in a process of its own; use as a context manager.

    Attributes:
        model: the name the server gives its model.
        url: where it listens.
    """

    def __init__(
        self, *arguments: str, env: dict[str, str] | None = None, ready_timeout_s: float = 900.0
    ) -> None:
        """Start and wait until the server is ready.

        Raises:
            RuntimeError: it ended or was not ready in time; carries its last lines.
        """
        command = [sys.executable, "-m", "xdeepserve.launch.cli", "serve", *arguments]
        self._process = subprocess.Popen(
            [*command, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
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
            raise RuntimeError("the server did not start:\n" + "".join(self._lines))

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)
            if found := READY.search(line):
                self.model, self.url = found.groups()
                self._ready.set()
        self._ready.set()

    def stop(self) -> None:
        """Ask the server to end, then make it end. Idempotent."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
        self._reader.join(STOP_TIMEOUT_S)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
