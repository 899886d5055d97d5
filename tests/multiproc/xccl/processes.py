"""Starting, killing and stopping the processes of a test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from xdeepserve.xccl import Layout, Port, unlink_all

ROOT = Path(__file__).resolve().parents[3]
HARD_LIMIT_S = 30.0
LAYOUT = Layout(
    max_ranks=8,
    p2p_slots=4,
    p2p_slot_bytes=4096,
    row_slots=4,
    request_bytes=64 << 10,
    reply_bytes=64 << 10,
)


class Process:
    """One worker: a function of `workers.py` in a process of its own."""

    def __init__(self, run_id: str, work: str, arguments: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.multiproc.xccl.workers", run_id, work],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(arguments))
        self._process.stdin.close()
        self._process.stdin = None

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def end(self) -> tuple[int, str]:
        """(exit status, stdout) once it has ended by itself; killed at the hard limit."""
        try:
            out, _ = self._process.communicate(timeout=HARD_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise
        return self._process.returncode, out

    def result(self) -> Any:
        """What it printed last, as JSON, after a clean end."""
        status, out = self.end()
        assert status == 0, f"status {status}: {out}"
        return json.loads(out.splitlines()[-1])

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


class Run:
    """The processes and own ports of one test."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self._processes: list[Process] = []
        self._ports: list[Port] = []

    def start(self, work: str, **arguments: Any) -> Process:
        process = Process(self.run_id, work, arguments)
        self._processes.append(process)
        return process

    def port(self, rank: int, *, frozen_after_s: float = 5.0, layout: Layout = LAYOUT) -> Port:
        port = Port(self.run_id, f"r{rank}", rank, layout=layout, frozen_after_s=frozen_after_s)
        self._ports.append(port)
        return port

    def end(self) -> None:
        for process in self._processes:
            process.kill()
        for port in self._ports:
            port.close()
        unlink_all(self.run_id)
