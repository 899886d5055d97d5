"""The supervisor of a run, seen from the gateway and the command line."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

from xdeepserve.control import ControlClient
from xdeepserve.launch.run_dir import RunDirectory
from xdeepserve.launch.supervisor.messages import (
    SUPERVISOR_NAME,
    GetStatus,
    Membership,
    Scale,
    Status,
    SupervisorReply,
)

CONNECT_TIMEOUT_S: Final = 2.0
CALL_TIMEOUT_S: Final = 10.0


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
    """Membership and heartbeats; errors as `connect_supervisor`."""
    async with connect_supervisor(run) as client:
        status: Status = await client.call(GetStatus(), timeout_s=CALL_TIMEOUT_S)
        return status


async def scale_run(run: RunDirectory, counts: Mapping[str, int]) -> Membership:
    """Begin to scale; returns the first membership of it.

    Raises:
        ConfigError: the supervisor refuses the counts.
        ConnectionLost, DeadlineExceeded: as `connect_supervisor`.
    """
    async with connect_supervisor(run) as client:
        membership: Membership = await client.call(Scale(dict(counts)), timeout_s=CALL_TIMEOUT_S)
        return membership
