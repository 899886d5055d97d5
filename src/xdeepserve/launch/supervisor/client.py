"""The supervisor of a run, seen from the gateway and the command line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.control import ControlClient
from xdeepserve.eplb import ExpertLoadReport
from xdeepserve.errors import ConnectionLost, DeadlineExceeded
from xdeepserve.launch.run_dir import RunDirectory
from xdeepserve.launch.supervisor.messages import (
    SUPERVISOR_NAME,
    GetStatus,
    Membership,
    Rebalance,
    Scale,
    Status,
    SupervisorReply,
)

CONNECT_TIMEOUT_S: Final = 2.0
CALL_TIMEOUT_S: Final = 10.0
REBALANCE_TIMEOUT_S: Final = 600.0
"""Thousands of experts move in small ticks."""
RESTART_TIMEOUT_S: Final = 15.0
"""From the first failure until a new supervisor answers: the gateway notices one that hangs within
its ping interval and timeout, kills it and starts another one."""
RETRY_S: Final = 0.05


@asynccontextmanager
async def connect_supervisor(run: RunDirectory) -> AsyncIterator[ControlClient]:
    """A connection to the supervisor, closed at the end of the block.

    Raises:
        ConnectionLost: it does not run at the moment.
        DeadlineExceeded: it hangs.
    """
    client = await ControlClient.connect(
        run.socket_path(SUPERVISOR_NAME), replies=SupervisorReply, timeout_s=CONNECT_TIMEOUT_S
    )
    try:
        yield client
    finally:
        await client.close()


async def status_of(run: RunDirectory) -> Status:
    """Membership and heartbeats.

    Raises:
        ConnectionLost, DeadlineExceeded: there is no supervisor, also not after a while;
            or the run has ended.
    """
    status: Status = await _call(run, GetStatus())
    return status


async def scale_run(run: RunDirectory, counts: Mapping[str, int]) -> Membership:
    """Begin to scale; returns the first membership of it.

    Raises:
        ConfigError: the supervisor refuses the counts.
        ConnectionLost, DeadlineExceeded: there is no supervisor, also not after a while;
            or the run has ended.
    """
    membership: Membership = await _call(run, Scale(dict(counts)))
    return membership


async def rebalance_run(
    run: RunDirectory,
    load: ExpertLoadReport | None = None,
    *,
    timeout_s: float = REBALANCE_TIMEOUT_S,
) -> Membership:
    """Move the experts to where a load, or the load counted, asks for; returns when they are there.

    Raises:
        ConfigError: there are no expert workers, or the load is of another model.
        ConnectionLost, DeadlineExceeded: there is no supervisor, it is being replaced, or it takes
            longer; what has moved then stays, what is left is for the next rebalance.
    """
    async with connect_supervisor(run) as client:
        membership: Membership = await client.call(Rebalance(load), timeout_s=timeout_s)
        return membership


async def _call(run: RunDirectory, request: GetStatus | Scale) -> Any:
    """Call the supervisor, or the next one if it is just being replaced.

    Both requests may repeat when a reply was lost: Scale names counts, not changes.
    """
    deadline_s: float | None = None
    while True:
        try:
            async with connect_supervisor(run) as client:
                return await client.call(request, timeout_s=CALL_TIMEOUT_S)
        except (ConnectionLost, DeadlineExceeded):
            now_s = SYSTEM_CLOCK.monotonic()
            if deadline_s is None:
                deadline_s = now_s + RESTART_TIMEOUT_S
            if now_s > deadline_s or run.gateway() is None:
                raise
        await asyncio.sleep(RETRY_S)
