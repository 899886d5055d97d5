"""serve with workers: this process is the gateway, its engine a router over DP groups."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import Final

from setproctitle import setproctitle

from xdeepserve import garbage
from xdeepserve.flowserve.build import engine_info
from xdeepserve.launch.background import Background
from xdeepserve.launch.cluster import Cluster
from xdeepserve.launch.cluster_metrics import ClusterCollector
from xdeepserve.launch.compose import LoadedModel, shape_of
from xdeepserve.launch.deployment import Deployment
from xdeepserve.launch.logs import setup_logging
from xdeepserve.launch.plan import resolve
from xdeepserve.launch.room import Room, check_room
from xdeepserve.launch.router_members import RouterMembers
from xdeepserve.launch.run_dir import clean_dead_runs
from xdeepserve.launch.service import ServiceConfig
from xdeepserve.launch.worker.bodies import bodies_for
from xdeepserve.maas.access import Access
from xdeepserve.maas.app import create_app
from xdeepserve.maas.server import make_server, url_of
from xdeepserve.text.generation_config import SamplingDefaults
from xdeepserve.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

STOP_DRAIN_S: Final = 1.0
"""Of the workers, after the gateway has drained: nothing of weight is left then."""

TITLE: Final = "xds:gateway"


def serve_cluster(
    deployment: Deployment,
    loaded: LoadedModel,
    *,
    names: list[str],
    listener: socket.socket,
    access: Access,
    access_log: bool,
) -> int:
    """Serve with workers until a signal; returns the exit code.

    Raises:
        ConfigError: the deployment does not fit the model or the machine.
        XDeepServeError: the workers do not start.
    """
    setproctitle(TITLE)
    for run in clean_dead_runs():
        logger.info("cleaned up what run %s left behind", run.run_id)
    shape = shape_of(loaded)
    plan = resolve(deployment, shape, usable_cores=os.sched_getaffinity(0))
    check_room(deployment, shape, Room.of_this_machine())
    # A KV cache that is too small or too large is found here, not by each DP group.
    engine_info(loaded.model, names[0], deployment.limits)
    service = ServiceConfig(
        model_path=str(loaded.path.resolve()),
        model_name=names[0],
        shape=shape,
        deployment=deployment,
        bodies=bodies_for(plan),
    )
    tokenizer = Tokenizer.from_folder(loaded.tokenizer_dir)
    defaults = SamplingDefaults.from_folder(loaded.tokenizer_dir)
    asyncio.run(_serve(service, tokenizer, defaults, names, listener, access, access_log))
    return 0


async def _serve(
    service: ServiceConfig,
    tokenizer: Tokenizer,
    defaults: SamplingDefaults,
    names: list[str],
    listener: socket.socket,
    access: Access,
    access_log: bool,
) -> None:
    deployment = service.deployment
    background = Background()
    members = RouterMembers(
        drain_timeout_s=deployment.supervision.drain_timeout_s, background=background
    )
    cluster = Cluster(service, members, background=background)
    setup_logging(TITLE, run_id=cluster.run.run_id)
    logger.info("run %s in %s", cluster.run.run_id, cluster.run.path)
    collector = ClusterCollector()
    background.start(collector.follow(cluster), name="asking the workers for metrics")
    ready_line = f"xdeepserve: serving {names[0]} on {url_of(listener)}"
    try:
        await cluster.start(timeout_s=deployment.supervision.start_timeout_s)
        app = create_app(
            members.router,
            tokenizer,
            deployment.gateway,
            model_names=names,
            defaults=defaults,
            collectors=[collector],
            access=access,
        )
        app.state.gateway.metrics.count_objectives(deployment.slo)
        server = make_server(
            app,
            deployment.gateway,
            access_log=access_log,
            on_ready=lambda: print(ready_line, flush=True),
        )
        garbage.settle()
        await background.guard(server.serve(sockets=[listener]), stop=server.stop)
    finally:
        await cluster.stop(drain_timeout_s=STOP_DRAIN_S)
