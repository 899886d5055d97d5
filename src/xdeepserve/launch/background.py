"""Background: tasks that run beside the main work of a process, none of which ends unseen."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from xdeepserve.errors import EngineDeadError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Background:
    """Owns tasks that run until `close`. One that ends by an error is logged; its owner must end.

    Used on one event loop.

    Attributes:
        failure: why the first task failed; None = none has.
    """

    def __init__(self) -> None:
        self.failure: str | None = None
        self._failed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run `work` beside everything else.

        Args:
            name: what it does, for the log.
        """
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_end)
        return task

    def _on_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        logger.error("%s failed", task.get_name(), exc_info=error)
        if self.failure is None:
            self.failure = f"{task.get_name()} failed: {type(error).__name__}: {error}"
        self._failed.set()

    async def guard(self, work: Awaitable[T], *, stop: Callable[[], None] | None = None) -> T:
        """The result of `work`, which ends as well when a task fails.

        Args:
            stop: makes `work` end in its own time; None = it is cancelled.

        Raises:
            EngineDeadError: a task has failed.
        """
        working, failed = asyncio.ensure_future(work), asyncio.create_task(self._failed.wait())
        try:
            await asyncio.wait({working, failed}, return_when=asyncio.FIRST_COMPLETED)
            if self.failure is None:
                return working.result()
            if stop is not None and not working.done():
                stop()
                await asyncio.wait({working})
            raise EngineDeadError(self.failure)
        finally:
            failed.cancel()
            working.cancel()
            await asyncio.gather(failed, working, return_exceptions=True)

    async def close(self) -> None:
        """Cancel all tasks and wait for their end. Idempotent."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
