"""A worker body for tests of supervision: does no work, obeys orders given as files.

The run directory may hold, before or while the worker runs:
    NAME.crash     its start fails
    NAME.misfit    its start fails as with a wrong configuration
    NAME.hang      its loop makes no progress
    NAME.stubborn  its drain takes all of its time
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

from xdeepserve.errors import ConfigError, EngineDeadError
from xdeepserve.messages import Heartbeat

LOOP_INTERVAL_S: Final = 0.02


class ObedientBody:
    """See the module. `orders` is the folder where the files are looked for."""

    def __init__(self, name: str, orders: Path) -> None:
        self._name = name
        self._orders = orders
        self._num_rounds = 0
        self._loop_task: asyncio.Task[None] | None = None

    def _is_ordered_to(self, what: str) -> bool:
        return (self._orders / f"{self._name}.{what}").exists()

    async def start(self) -> None:
        """Start the loop, or fail when told to."""
        if self._is_ordered_to("crash"):
            raise EngineDeadError(f"{self._name} was told to crash")
        if self._is_ordered_to("misfit"):
            raise ConfigError(f"{self._name} was told to misfit")
        self._loop_task = asyncio.create_task(self._loop())

    async def _loop(self) -> None:
        while True:
            if not self._is_ordered_to("hang"):
                self._num_rounds += 1
            await asyncio.sleep(LOOP_INTERVAL_S)

    def heartbeat(self) -> Heartbeat:
        """Progress is the number of rounds."""
        return Heartbeat(progress=self._num_rounds, load={"rounds": self._num_rounds})

    async def drain(self, *, timeout_s: float) -> None:
        """Return at once, or when told so at the timeout."""
        if self._is_ordered_to("stubborn"):
            await asyncio.sleep(timeout_s)

    async def close(self) -> None:
        """Stop the loop."""
        if self._loop_task is not None:
            self._loop_task.cancel()


def make_body(context: Any) -> ObedientBody:
    """The factory that a ServiceConfig names."""
    return ObedientBody(context.spec.name, context.run.path)
