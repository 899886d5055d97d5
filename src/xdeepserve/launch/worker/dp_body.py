"""DPBody: a DP group with the whole model in its process, behind a socket."""

from __future__ import annotations

import asyncio
from pathlib import Path

from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.flowserve.dp_server import DPServer
from xdeepserve.launch.compose import load_model_at
from xdeepserve.launch.worker.body import WorkerContext
from xdeepserve.messages import Heartbeat


class DPBody:
    """WorkerBody of the attention role while no other role has workers."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._group: DPGroup | None = None
        self._server: DPServer | None = None

    async def start(self) -> None:
        """Load the model, warm up, open the socket."""
        self._group = await asyncio.to_thread(self._build)
        path = self._context.run.socket_path(self._context.spec.name)
        self._server = DPServer(self._group, path)
        await self._server.start()

    def _build(self) -> DPGroup:
        service = self._context.service
        model = load_model_at(Path(service.model_path), self._context.precision())
        return build_dp_group(
            model=model, model_name=service.model_name, config=service.deployment.limits
        )

    def heartbeat(self) -> Heartbeat:
        """Progress is counted in steps; a group without requests is idle."""
        assert self._group is not None, "heartbeats begin when start() has returned"
        load = self._group.load()
        return Heartbeat(
            progress=load.num_steps,
            is_idle=load.num_running + load.num_waiting == 0,
            load={
                "running": load.num_running,
                "waiting": load.num_waiting,
                "kv_usage": round(load.kv_usage, 3),
                "generated": load.num_generated_tokens,
            },
            error=None if self._group.is_alive() else "the step loop ended or is stuck",
        )

    async def drain(self, *, timeout_s: float) -> None:
        """Finish what runs; what is left at the timeout is aborted."""
        if self._server is not None:
            await self._server.close(drain_timeout_s=timeout_s)

    async def close(self) -> None:
        """Abort what runs, stop the loop, close the socket."""
        if self._server is not None:
            await self._server.close(drain_timeout_s=0.0)


def make_body(context: WorkerContext) -> DPBody:
    """The factory that a ServiceConfig names."""
    return DPBody(context)
