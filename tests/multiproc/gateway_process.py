"""A gateway in a process of its own: starts a cluster, prints its pids, waits to be killed."""

from __future__ import annotations

import asyncio

import msgspec

from tests.multiproc.cluster_harness import DEADLINE_S, Recorder, make_service, supervisor_pid
from xdeepserve.launch.cluster import Cluster


async def main() -> None:
    cluster = Cluster(make_service(attention=1, expert=1), Recorder())
    await cluster.start(timeout_s=DEADLINE_S)
    assert cluster.membership is not None
    pids = [member.process.pid for member in cluster.membership.members if member.process]
    print(msgspec.json.encode([*pids, supervisor_pid(cluster)]).decode(), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
