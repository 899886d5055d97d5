"""Work that lasts no longer than the client who asked for it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from xdeepserve.maas.http_errors import ClientGone

T = TypeVar("T")


async def unless_disconnected(
    receive: Receive, work: Coroutine[Any, Any, T], *signs: Coroutine[Any, Any, None]
) -> T:
    """Result of `work`; it is cancelled, and has ended, when the client goes away first.

    Args:
        receive: of a request whose body was read.
        work: what the client waits for.
        signs: each returns when the client counts as gone for another reason.

    Raises:
        ClientGone: the client closed the connection, or there was a sign.
    """
    task = asyncio.create_task(work)
    watchers = [asyncio.create_task(sign) for sign in (_wait_for_disconnect(receive), *signs)]
    try:
        await asyncio.wait((task, *watchers), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(task, *watchers, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
