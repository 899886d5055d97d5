"""What the benchmark asks of an engine: how to start it as a worker and as a server.

`Settings` go to the worker program as JSON; a worker is a process that obeys orders.
"""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from benchmarks.peers.environment import Command, Unavailable, peers_folder
from benchmarks.peers.turns import STOP_TIMEOUT_S, TurnProcess

WORKERS: Final = Path(__file__).resolve().parent / "workers"
PRECISIONS: Final = ("16-bit", "8-bit", "4-bit")

START_TIMEOUT_S: Final = 900.0
ORDER_TIMEOUT_S: Final = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all engines are told alike.

    Attributes:
        threads: cores to compute on.
        max_seqs: most sequences in one step.
        max_model_len: longest prompt and answer.
        prefix_caching: on only where a workload shares prefixes; elsewhere it only costs.
    """

    threads: int
    max_seqs: int
    max_model_len: int
    prefix_caching: bool


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI-compatible server: how to start it, its port, and its name for the model."""

    command: Command
    port: int
    model: str


class Peer(Protocol):
    """One engine.

    Attributes:
        name: in the table.
        variants: precision class -> what the engine has in that class; the best one counts.
    """

    name: str
    variants: Mapping[str, tuple[str, ...]]

    def worker(self, model: str, variant: str, settings: Settings) -> Command:
        """The worker's command; builds the environment and converts the model where needed.

        Raises:
            Unavailable: it cannot run this here.
        """

    def server(self, model: str, variant: str, settings: Settings, port: int) -> Server:
        """The server's command, on `port`.

        Raises:
            Unavailable: it cannot run this here, or has no server.
        """


def worker_command(
    python: str | Path,
    program: str,
    settings: Mapping[str, Any],
    *,
    env: Mapping[str, str] | None = None,
) -> Command:
    """The command of the program `program` in `workers/` with its settings."""
    return Command((str(python), str(WORKERS / program), json.dumps(settings)), dict(env or {}))


class WorkerProcess:
    """A worker that is ready for orders; use as a context manager."""

    def __init__(self, name: str, command: Command) -> None:
        """Start it and wait until its model is loaded.

        Raises:
            Unavailable: it ended, or was not ready in time; carries its last words.
        """
        self._log = peers_folder() / f"{name.replace(' ', '-').replace('/', '-')}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("w") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._turns = TurnProcess(command.argv, command.environ, log, **pipes)
        self._process = self._turns.process
        self._answers: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            with self._turns.turn():
                self._answer(START_TIMEOUT_S)
        except BaseException:  # also when this program is told to end
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None, "opened as a pipe"
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Run an order.

        Raises:
            Unavailable: the engine could not do it.
        """
        assert self._process.stdin is not None, "opened as a pipe"
        with self._turns.turn():
            try:
                self._process.stdin.write(json.dumps(order) + "\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                raise Unavailable(self._last_words()) from None
            return self._answer(ORDER_TIMEOUT_S)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise Unavailable(f"no answer after {timeout_s:g} s") from None
        if not line:
            raise Unavailable(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Unavailable(answer["error"])
        return answer

    def _last_words(self) -> str:
        lines = self._log.read_text("utf-8", "replace").strip().splitlines()
        code = self._process.wait(STOP_TIMEOUT_S)
        return f"ended with code {code}: {lines[-1].strip() if lines else 'it said nothing'}"

    def stop(self) -> None:
        """End it. Idempotent."""
        self._turns.stop()
        self._reader.join(STOP_TIMEOUT_S)

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
