"""The admin API on a socket of its own, in the process and for the life of the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Generator

import uvicorn
from starlette.applications import Starlette

from xdeepserve.maas.server import CLOSE_TIMEOUT_S, KEEP_ALIVE_S, BoundedHttpProtocol

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64


class _Companion(uvicorn.Server):
    """uvicorn that leaves signals to the server beside it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


@contextlib.asynccontextmanager
async def serving(app: Starlette, listener: socket.socket) -> AsyncIterator[None]:
    """Answer on `listener` inside the block; running requests get CLOSE_TIMEOUT_S at its end."""
    config = uvicorn.Config(
        app,
        http=BoundedHttpProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # anybody could say to be somewhere else
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
    )
    server = _Companion(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="admin API")
    try:
        yield
    finally:
        server.should_exit = True
        await task
