"""ModuleBody: an FFN or expert worker. Serves its modules to every DP group over XCCL."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Final

import msgspec

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.launch.background import Background
from xdeepserve.launch.compose import load_model_at
from xdeepserve.launch.fabric import Fabric
from xdeepserve.launch.placement import experts_of
from xdeepserve.launch.worker.body import WorkerContext
from xdeepserve.launch.worker.expert_pages import load_experts
from xdeepserve.launch.worker.routing_feed import published_placement
from xdeepserve.messages import Heartbeat
from xdeepserve.transformerless.module_server import ModuleServer
from xdeepserve.transformerless.partition import Partition, partition
from xdeepserve.transformerless.stage_times import StageTimes

IDLE_S: Final = 0.3
"""A draining worker ends when nobody has asked for so long; who asks later goes elsewhere."""

BEAT_INTERVAL_S: Final = 0.05
"""Far below the silence after which askers go round a worker."""

JOIN_TIMEOUT_S: Final = 2.0

logger = logging.getLogger(__name__)


class ModuleBody:
    """WorkerBody of the roles ffn and expert."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._times = StageTimes()
        self._units: Partition | None = None
        self._server: ModuleServer | None = None
        self._thread: threading.Thread | None = None
        self._background = Background()
        self._error: str | None = None

    async def start(self) -> None:
        """Map the weights, those of its own experts into memory, make the segment, serve."""
        self._server = await asyncio.to_thread(self._build)
        self._thread = threading.Thread(
            target=self._run, args=(self._server,), name=self._context.spec.title, daemon=True
        )
        self._thread.start()
        self._background.start(self._beat(self._server), name="the sign of life")

    async def _beat(self, server: ModuleServer) -> None:
        """Show that the loop lives while it computes; a stuck one is gone round, then killed."""
        while self._error is None:
            server.beat()
            await asyncio.sleep(BEAT_INTERVAL_S)

    def _build(self) -> ModuleServer:
        context, spec = self._context, self._context.spec
        service = context.service
        model = load_model_at(Path(service.model_path), context.precision(), verify=False)
        self._units = partition(model)
        load_experts(self._units.experts, self._first_experts())
        fabric = Fabric.of(context.run.run_id, service.deployment, service.shape)
        port = fabric.open_port(spec.name, spec.role, spec.rank)
        return ModuleServer(port, self._units, stage_times=self._times)

    def _first_experts(self) -> list[tuple[int, int]]:
        """(layer, expert) that tokens will come for: as placed now, of a new worker its slice."""
        context, spec = self._context, self._context.spec
        if spec.experts is None:
            return []
        placement = None
        with contextlib.suppress(OSError, msgspec.DecodeError):
            placement = published_placement(context.run)
        if placement is None or spec.rank not in placement.expert:
            return list(product(range(context.service.shape.num_layers), range(*spec.experts)))
        return [(idx, e) for idx, row in enumerate(experts_of(placement, spec.rank)) for e in row]

    def _run(self, server: ModuleServer) -> None:
        try:
            server.run()
        except Exception as exc:  # loop top: the supervisor learns why from the heartbeat
            logger.exception("the loop of %s failed", self._context.spec.name)
            self._error = f"{type(exc).__name__}: {exc}"

    async def load_experts(self, experts: Sequence[tuple[int, int]]) -> int:
        """See HoldsExperts."""
        assert self._units is not None, "a worker is asked once it is ready"
        return await asyncio.to_thread(load_experts, self._units.experts, experts)

    def heartbeat(self) -> Heartbeat:
        """Progress is counted in rounds; the loop goes round when nobody asks, too."""
        assert self._server is not None, "heartbeats begin when start() has returned"
        return Heartbeat(
            progress=self._server.num_rounds,
            load={
                "requests": self._server.num_requests,
                "rows": self._server.num_rows,
            },
            stage_s={stage.value: s for stage, s in self._times.seconds().items()},
            error=self._error or self._background.failure,
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
        await self._background.close()
        if self._server is not None and self._thread is not None:
            self._server.stop()
            await asyncio.to_thread(self._thread.join, JOIN_TIMEOUT_S)


def make_body(context: WorkerContext) -> ModuleBody:
    """The factory that a ServiceConfig names."""
    return ModuleBody(context)
