"""WorkerProcess: the life of a worker around its body.

    start body --> ready --> [ SIGTERM | drained | body failed | gateway gone ] --> close body

Heartbeats are answered during all of it, so that a worker that loads is told from one that hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable
from typing import Final

from xdeepserve import garbage
from xdeepserve.control import ControlServer, Peer
from xdeepserve.errors import ConfigError
from xdeepserve.launch.worker.body import CountsExperts, HoldsExperts, WorkerBody, WorkerContext
from xdeepserve.launch.worker.exit_codes import EXIT_FAILED, EXIT_OK
from xdeepserve.launch.worker.gateway_watch import GatewayWatch
from xdeepserve.launch.worker.messages import (
    Drain,
    Drained,
    ExpertsLoaded,
    GetExpertLoad,
    GetHeartbeat,
    HeartbeatReply,
    LoadExperts,
    WorkerReply,
    WorkerRequest,
)
from xdeepserve.messages import Heartbeat

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S: Final = 3.0
"""How long the body may take to close."""


class WorkerProcess:
    """One worker; `run` returns when it has ended."""

    def __init__(self, context: WorkerContext, body: WorkerBody) -> None:
        self._context = context
        self._body = body
        self._is_ready = False
        self._exit_code = EXIT_OK
        self._stop = asyncio.Event()

    async def run(self) -> int:
        """Work until something ends the worker.

        Returns:
            The exit code.

        Raises:
            XDeepServeError: the body did not start.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        GatewayWatch(
            self._context.run,
            on_gone=lambda: _call_on(loop, self._stop.set),
            grace_s=CLOSE_TIMEOUT_S + 1.0,
        )
        async with self._control_server():
            try:
                await self._start_body()
                await self._stop.wait()
            finally:
                await self._close_body()
        return self._exit_code

    @contextlib.asynccontextmanager
    async def _control_server(self) -> AsyncIterator[None]:
        path = self._context.run.control_path(self._context.spec.name)
        server = ControlServer(path, self._answer, requests=WorkerRequest)
        await server.start()
        try:
            yield
        finally:
            await server.close()

    async def _start_body(self) -> None:
        """Start the body, or return early when the worker is to end."""
        starting = asyncio.create_task(self._body.start())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not starting.done():
            starting.cancel()
            return
        starting.result()
        garbage.settle()
        self._is_ready = True
        name, incarnation = self._context.spec.name, self._context.incarnation
        logger.info("%s is ready (incarnation %d)", name, incarnation)

    async def _close_body(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._body.close()
        except TimeoutError:
            logger.warning("the body did not close within %.0f s", CLOSE_TIMEOUT_S)

    async def _answer(self, request: WorkerRequest, peer: Peer) -> WorkerReply:
        match request:
            case GetHeartbeat():
                return self._heartbeat()
            case Drain(timeout_s):
                if self._is_ready:
                    await self._body.drain(timeout_s=timeout_s)
                self._stop.set()
                return Drained()
            case GetExpertLoad() if isinstance(self._body, CountsExperts):
                return self._body.expert_load()
            case LoadExperts(experts) if isinstance(self._body, HoldsExperts) and self._is_ready:
                return ExpertsLoaded(await self._body.load_experts(experts))
            case _:
                raise ConfigError(
                    f"{self._context.spec.name} cannot answer {type(request).__name__}"
                )

    def _heartbeat(self) -> HeartbeatReply:
        heartbeat = self._body.heartbeat() if self._is_ready else None
        if heartbeat is not None and heartbeat.error is not None:
            self._fail(heartbeat)
        return HeartbeatReply(
            incarnation=self._context.incarnation,
            is_ready=self._is_ready,
            heartbeat=heartbeat,
        )

    def _fail(self, heartbeat: Heartbeat) -> None:
        """A body whose loop has ended cannot be repaired: end, so that a new worker starts."""
        logger.error("the worker's loop ended: %s", heartbeat.error)
        self._exit_code = EXIT_FAILED
        self._stop.set()


def _call_on(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    with contextlib.suppress(RuntimeError):  # The loop is closed: the process is ending already.
        loop.call_soon_threadsafe(function)
