"""Calls of a supervisor that hangs, is replaced, or is gone for good."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from tests.multiproc.cluster_harness import run_folder
from xdeepserve.control import ControlServer, Peer
from xdeepserve.errors import ConfigError, ConnectionLost, DeadlineExceeded
from xdeepserve.launch.run_dir import RunDirectory, create_run
from xdeepserve.launch.supervisor import client
from xdeepserve.launch.supervisor.client import scale_run, status_of
from xdeepserve.launch.supervisor.messages import (
    SUPERVISOR_NAME,
    Membership,
    Scale,
    SupervisorReply,
    SupervisorRequest,
)

MEMBERSHIP = Membership(epoch=3, run_id="00000000", counts={}, members=())

Answer = Callable[[int, SupervisorRequest], Awaitable[SupervisorReply]]


@asynccontextmanager
async def supervisor_of(run: RunDirectory, answer: Answer) -> AsyncIterator[list[object]]:
    """Serves a run; yields the requests that have come."""
    requests: list[object] = []

    async def handle(request: SupervisorRequest, peer: Peer) -> SupervisorReply:
        requests.append(request)
        return await answer(len(requests), request)

    path = run.socket_path(SUPERVISOR_NAME)
    server = ControlServer(path, handle, requests=SupervisorRequest)
    await server.start()
    try:
        yield requests
    finally:
        await server.close()


async def hang(count: int, request: SupervisorRequest) -> SupervisorReply:
    await asyncio.Event().wait()
    raise AssertionError


async def hang_once(count: int, request: SupervisorRequest) -> SupervisorReply:
    return MEMBERSHIP if count > 1 else await hang(count, request)


async def test_a_call_that_is_not_answered_in_time_is_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "CALL_TIMEOUT_S", 0.1)
    with run_folder():
        run, lease = create_run()
        async with supervisor_of(run, hang_once) as requests:
            assert await scale_run(run, {"expert": 2}) == MEMBERSHIP
            assert requests == [Scale({"expert": 2})] * 2
        lease.release()


async def test_the_first_failure_starts_the_time_for_a_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A call that lasts longer than a restart may take does not use up the restart's time.
    monkeypatch.setattr(client, "CALL_TIMEOUT_S", 0.3)
    monkeypatch.setattr(client, "RESTART_TIMEOUT_S", 0.2)
    with run_folder():
        run, lease = create_run()
        async with supervisor_of(run, hang_once) as requests:
            assert await scale_run(run, {}) == MEMBERSHIP
            assert len(requests) == 2
        async with supervisor_of(run, hang) as requests:
            with pytest.raises(DeadlineExceeded):
                await status_of(run)
            assert len(requests) == 2
        lease.release()


async def test_what_the_supervisor_refuses_is_not_repeated() -> None:
    async def refuse(count: int, request: SupervisorRequest) -> SupervisorReply:
        raise ConfigError("no")

    with run_folder():
        run, lease = create_run()
        async with supervisor_of(run, refuse) as requests:
            with pytest.raises(ConfigError):
                await scale_run(run, {"expert": 99})
            assert len(requests) == 1
        lease.release()


async def test_nobody_is_waited_for_once_the_run_has_ended() -> None:
    with run_folder():
        run, lease = create_run()
        lease.release()
        with pytest.raises(ConnectionLost):
            await asyncio.wait_for(status_of(run), client.RESTART_TIMEOUT_S / 2)
