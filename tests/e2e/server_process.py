"""Starts `xdeepserve serve` as a user would and waits for the line that says where it listens."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from types import TracebackType

READY = re.compile(r"xdeepserve: serving (\S+) on (http://\S+)")


class ServerProcess:
    """A server in a process of its own; use as a context manager."""

    def __init__(self, *arguments: str, ready_timeout_s: float = 180.0) -> None:
        command = [sys.executable, "-m", "xdeepserve.launch.cli", "serve", *arguments]
        self.lines: list[str] = []
        self.url = ""
        self._ready = threading.Event()
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read_output, name="server-output")
        self._reader.start()
        if not self._ready.wait(ready_timeout_s) or not self.url:
            self.stop()
            raise RuntimeError("server did not start:\n" + "".join(self.lines[-40:]))

    def _read_output(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            found = READY.search(line)
            if found:
                self.url = found.group(2)
                self._ready.set()
        self._ready.set()

    def terminate(self) -> None:
        """Send SIGTERM; the server drains."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float) -> int:
        """Exit code, within the deadline."""
        return self.process.wait(timeout_s)

    def stop(self) -> None:
        """End the process whatever its state."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(20)
        self._reader.join(20)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
