"""ModuleBody: an FFN or expert worker. Serves its modules to every DP group over XCCL."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from typing import Final

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.launch.compose import load_model_at
from xdeepserve.launch.fabric import Fabric
from xdeepserve.launch.worker.body import WorkerContext
from xdeepserve.messages import Heartbeat
from xdeepserve.transformerless.module_server import ModuleServer
from xdeepserve.transformerless.partition import partition
from xdeepserve.transformerless.stage_times import Stage, StageTimes

IDLE_S: Final = 0.3
"""A draining worker ends when nobody has asked for so long; who asks later goes elsewhere."""

JOIN_TIMEOUT_S: Final = 2.0

logger = logging.getLogger(__name__)


class ModuleBody:
    """WorkerBody of the roles ffn and expert."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._times = StageTimes()
        self._server: ModuleServer | None = None
        self._thread: threading.Thread | None = None
        self._error: str | None = None

    async def start(self) -> None:
        """Map the weights, make the segment, serve."""
        self._server = await asyncio.to_thread(self._build)
        self._thread = threading.Thread(
            target=self._run, args=(self._server,), name=self._context.spec.name, daemon=True
        )
        self._thread.start()

    def _build(self) -> ModuleServer:
        context, spec = self._context, self._context.spec
        service = context.service
        model = load_model_at(Path(service.model_path), context.precision())
        fabric = Fabric.of(context.run.run_id, service.deployment, service.shape)
        port = fabric.open_port(spec.name, spec.role, spec.rank)
        return ModuleServer(port, partition(model), stage_times=self._times)

    def _run(self, server: ModuleServer) -> None:
        try:
            server.run()
        except Exception as exc:  # loop top: the supervisor learns why from the heartbeat
            logger.exception("the loop of %s failed", self._context.spec.name)
            self._error = f"{type(exc).__name__}: {exc}"

    def heartbeat(self) -> Heartbeat:
        """Progress is counted in rounds; the loop goes round when nobody asks, too."""
        assert self._server is not None, "heartbeats begin when start() has returned"
        seconds = self._times.seconds()
        computed_s = seconds.get(Stage.FFN, 0.0) + seconds.get(Stage.EXPERT, 0.0)
        return Heartbeat(
            progress=self._server.num_rounds,
            load={
                "requests": self._server.num_requests,
                "rows": self._server.num_rows,
                "busy_s": round(computed_s, 3),
            },
            error=self._error,
        )

    async def drain(self, *, timeout_s: float) -> None:
        """Serve until nobody asks any more."""
        assert self._server is not None, "a worker drains once it is ready"
        deadline_s = SYSTEM_CLOCK.monotonic() + timeout_s
        before = -1
        while before != self._server.num_requests and SYSTEM_CLOCK.monotonic() < deadline_s:
            before = self._server.num_requests
            await asyncio.sleep(IDLE_S)

    async def close(self) -> None:
        """End the loop and close the segment."""
        if self._server is not None and self._thread is not None:
            self._server.stop()
            await asyncio.to_thread(self._thread.join, JOIN_TIMEOUT_S)


def make_body(context: WorkerContext) -> ModuleBody:
    """The factory that a ServiceConfig names."""
    return ModuleBody(context)
