"""DPBody: a DP group behind a socket; its FFNs and experts here, or with workers of their own."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

from xdeepserve.eplb import ExpertLoadReport, ExpertLoadStats
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.flowserve.dp_server import DPServer
from xdeepserve.launch.background import Background
from xdeepserve.launch.compose import load_model_at
from xdeepserve.launch.fabric import Fabric, is_taken_apart
from xdeepserve.launch.worker.body import WorkerContext
from xdeepserve.launch.worker.routing_feed import RoutingFeed
from xdeepserve.messages import Heartbeat
from xdeepserve.models.decoder import Model
from xdeepserve.transformerless.expert_share import ExpertShare
from xdeepserve.transformerless.partition import partition
from xdeepserve.transformerless.stage_times import StageTimes
from xdeepserve.transformerless.xccl_transport import XcclTransport

LINK_TIMEOUT_S: Final = 10.0
"""How long a new group waits for workers that start at the same time."""
RELINK_TIMEOUT_S: Final = 1.0
"""The same of one that is started again: they are there, or it does their work until they are."""

logger = logging.getLogger(__name__)


class DPBody:
    """WorkerBody of the attention role."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._times = StageTimes()
        shape = context.service.shape
        # One window that is never closed: running totals.
        self._load_stats = ExpertLoadStats(
            num_layers=shape.num_layers, num_experts=max(shape.num_experts, 1), num_windows=1
        )
        self._group: DPGroup | None = None
        self._server: DPServer | None = None
        self._transport: XcclTransport | None = None
        self._background = Background()

    async def start(self) -> None:
        """Load the model, warm up once the other workers serve, open the socket."""
        feed = self._routing_feed()
        if feed is not None:
            self._background.start(feed.follow(), name="following the routing")
        self._group = await asyncio.to_thread(self._build, feed)
        path = self._context.run.socket_path(self._context.spec.name)
        self._server = DPServer(self._group, path)
        await self._server.start()

    def _routing_feed(self) -> RoutingFeed | None:
        service, run = self._context.service, self._context.run
        if not is_taken_apart(service.deployment):
            return None
        fabric = Fabric.of(run.run_id, service.deployment, service.shape)
        return RoutingFeed(run, service, fabric)

    def _build(self, feed: RoutingFeed | None) -> DPGroup:
        service = self._context.service
        model = load_model_at(Path(service.model_path), self._context.precision(), verify=False)
        if feed is not None:
            self._transport = self._connect(model, feed)
        return build_dp_group(
            model=model,
            model_name=service.model_name,
            config=service.deployment.limits,
            transport=self._transport,
            stage_times=self._times,
            name=self._context.spec.title,
        )

    def _connect(self, model: Model, feed: RoutingFeed) -> XcclTransport:
        spec, limits = self._context.spec, self._context.service.deployment.limits
        transport = XcclTransport(
            port=feed.fabric.open_port(spec.name, spec.role, spec.rank),
            units=partition(model),
            routing=feed.routing,
            stage_times=self._times,
            load_stats=self._load_stats,
            share=ExpertShare() if limits.share_experts else None,
        )
        is_new = self._context.incarnation == 1
        timeout_s = LINK_TIMEOUT_S if is_new else RELINK_TIMEOUT_S
        if not transport.wait_complete(timeout_s=timeout_s):
            logger.warning("%s begins without some FFN or expert workers", spec.name)
        return transport

    def expert_load(self) -> ExpertLoadReport:
        """See CountsExperts."""
        return self._load_stats.report()

    def heartbeat(self) -> Heartbeat:
        """Progress is counted in steps and exchanges; a group without requests is idle.

        An exchange with a peer that does not answer ends in time, so no group is killed for it.
        """
        assert self._group is not None, "heartbeats begin when start() has returned"
        load = self._group.load()
        return Heartbeat(
            progress=load.num_steps + self._num_exchanges(),
            is_idle=load.num_running + load.num_waiting == 0,
            load={
                "running": load.num_running,
                "waiting": load.num_waiting,
                "kv_usage": round(load.kv_usage, 3),
                "generated": load.num_generated_tokens,
                **self._exchange_counts(),
            },
            stage_s={stage.value: s for stage, s in self._times.seconds().items()},
            error=self._error(),
        )

    def _error(self) -> str | None:
        is_alive = self._group is not None and self._group.is_alive()
        return self._background.failure if is_alive else "the step loop ended or is stuck"

    def _num_exchanges(self) -> int:
        return 0 if self._transport is None else self._transport.num_exchanges

    def _exchange_counts(self) -> dict[str, float]:
        """How often others, or this process, took over for a lost rank; its answers dropped."""
        transport = self._transport
        if transport is None:
            return {}
        return {
            "failovers": transport.num_failovers,
            "fallbacks": transport.num_fallbacks,
            "late_answers": transport.num_late_answers,
        }

    async def drain(self, *, timeout_s: float) -> None:
        """Finish what runs; what is left at the timeout is aborted."""
        if self._server is not None:
            await self._server.close(drain_timeout_s=timeout_s)

    async def close(self) -> None:
        """Abort what runs, stop the loop, close the socket."""
        await self._background.close()
        if self._server is not None:
            await self._server.close(drain_timeout_s=0.0)


def make_body(context: WorkerContext) -> DPBody:
    """The factory that a ServiceConfig names."""
    return DPBody(context)
