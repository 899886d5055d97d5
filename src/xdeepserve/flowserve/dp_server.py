"""DPServer: one DP group behind a unix socket, in a process of its own.

    step loop thread                     event loop
    outputs of a step --- one wake-up --> _deliver -> _Outbox of each connection
                                                        -> one Events frame per connection

A connection owns the requests it submitted. When it is lost they are aborted: the gateway has
their tokens and resumes them wherever it likes, here included.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from pathlib import Path
from typing import Final

import msgspec

from xdeepserve.control import ControlServer, Peer, to_remote
from xdeepserve.errors import CapacityError, RequestError, XDeepServeError
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.flowserve.dp_messages import (
    Abort,
    Attach,
    Attached,
    DPStatus,
    Events,
    FromGateway,
    GetStatus,
    Refused,
    Submit,
)
from xdeepserve.flowserve.validation import validate_request
from xdeepserve.messages import GenerateRequest, TokenOutput

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S: Final = 0.25
"""Events are sent at least so often; a silent group counts as lost (see RemoteEngine)."""

MAX_OUTPUTS_PER_FRAME: Final = 4096
MAX_UNSENT_OUTPUTS: Final = 1 << 16
"""Outputs kept for a gateway that does not read; beyond it the connection is given up."""

JOIN_MARGIN_S: Final = 60.0
"""How long after the drain timeout the step loop may take to end its last step."""


class DPServer:
    """Serves a DP group that is not started yet, from `start` to `close`."""

    def __init__(
        self, group: DPGroup, path: Path, *, report_interval_s: float = REPORT_INTERVAL_S
    ) -> None:
        self._group = group
        self._report_interval_s = report_interval_s
        self._server = ControlServer(
            path,
            self._handle_call,
            requests=FromGateway,
            on_notice=self._handle_notice,
            on_lost=self._handle_lost,
        )
        self._outboxes: dict[int, _Outbox] = {}
        self._owners: dict[str, _Outbox] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Warm the group up, start its loop, then open the socket: who can connect can submit."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._group.start, self._on_outputs)
        await self._server.start()

    async def close(self, *, drain_timeout_s: float) -> None:
        """Refuse new requests, drain, abort the rest, send what is left, close. Idempotent."""
        self._group.begin_close(drain_timeout_s=drain_timeout_s)
        timeout_s = drain_timeout_s + JOIN_MARGIN_S if self._group.is_alive() else 0.0
        if not await asyncio.to_thread(self._group.join, timeout_s=timeout_s):
            logger.error("the step loop did not end within %.0f s of closing", timeout_s)
        # Outputs of the last step were handed over before the loop ended; let them be sent.
        for outbox in self._outboxes.values():
            await outbox.wait_until_empty(self._report_interval_s)
        await self._server.close()

    # -- outputs --------------------------------------------------------------------------------

    def _on_outputs(self, outputs: list[TokenOutput]) -> None:
        """Outbox of the group; runs on the step loop's thread."""
        loop = self._loop
        assert loop is not None, "the group was started by start()"
        try:
            loop.call_soon_threadsafe(self._deliver, outputs)
        except RuntimeError:
            logger.warning("event loop closed: %d outputs have no reader", len(outputs))

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            is_last = output.finish_reason is not None
            owners = self._owners
            outbox = owners.pop(output.request_id, None) if is_last else None
            if outbox is None:
                outbox = owners.get(output.request_id)
            if outbox is None:
                continue
            if is_last:
                outbox.request_ids.discard(output.request_id)
            outbox.outputs.append(output)
            outbox.news.set()
            if len(outbox.outputs) > MAX_UNSENT_OUTPUTS:
                self._give_up(outbox)

    def _give_up(self, outbox: _Outbox) -> None:
        """The gateway does not read: forget what it should have got, and its requests."""
        outbox.is_given_up = True
        outbox.outputs.clear()
        self._abort_all(outbox)

    def _abort_all(self, outbox: _Outbox) -> None:
        for request_id in outbox.request_ids:
            self._owners.pop(request_id, None)
            self._group.abort(request_id)
        outbox.request_ids.clear()

    # -- messages -------------------------------------------------------------------------------

    def _handle_call(
        self, message: FromGateway, peer: Peer
    ) -> Awaitable[msgspec.Struct] | AsyncGenerator[msgspec.Struct, None]:
        match message:
            case Attach():
                return self._events(self._outbox_of(peer))
            case GetStatus():
                return self._status()
            case _:
                raise RequestError(f"{type(message).__name__} is a notice, not a call")

    def _handle_notice(self, message: FromGateway, peer: Peer) -> None:
        match message:
            case Submit(request):
                self._submit(request, self._outbox_of(peer))
            case Abort(request_id):
                if self._owners.get(request_id) is self._outbox_of(peer):
                    self._group.abort(request_id)
            case _:
                raise RequestError(f"{type(message).__name__} is a call, not a notice")

    def _handle_lost(self, peer: Peer) -> None:
        outbox = self._outboxes.pop(peer.connection_id, None)
        if outbox is not None and outbox.request_ids:
            logger.warning(
                "process %d is gone: aborting its %d requests", peer.pid, len(outbox.request_ids)
            )
            self._abort_all(outbox)

    def _outbox_of(self, peer: Peer) -> _Outbox:
        return self._outboxes.setdefault(peer.connection_id, _Outbox())

    def _submit(self, request: GenerateRequest, outbox: _Outbox) -> None:
        outbox.num_received += 1
        try:
            validate_request(request, self._group.info)
            if request.request_id in self._owners:
                raise RequestError(f"request_id={request.request_id!r} is already in use")
            self._group.submit(request)
        except XDeepServeError as exc:
            outbox.refused.append(Refused(request.request_id, to_remote(exc)))
            outbox.news.set()
        else:
            outbox.request_ids.add(request.request_id)
            self._owners[request.request_id] = outbox

    async def _status(self) -> DPStatus:
        return DPStatus(
            info=self._group.info,
            load=self._group.load(),
            is_alive=self._group.is_alive(),
            num_connections=self._server.num_connections,
        )

    async def _events(self, outbox: _Outbox) -> AsyncGenerator[msgspec.Struct, None]:
        yield Attached(self._group.info)
        while True:
            await _wait(outbox.news, self._report_interval_s)
            if outbox.is_given_up:
                raise CapacityError(f"{MAX_UNSENT_OUTPUTS} outputs wait unread; read faster")
            outputs, refused = outbox.take()
            yield Events(
                outputs=outputs,
                refused=refused,
                load=self._group.load(),
                is_alive=self._group.is_alive(),
                num_received=outbox.num_received,
            )


class _Outbox:
    """What one connection is still to be told, and the requests it owns."""

    def __init__(self) -> None:
        self.outputs: list[TokenOutput] = []
        self.refused: list[Refused] = []
        self.request_ids: set[str] = set()
        self.num_received = 0
        self.is_given_up = False
        self.news = asyncio.Event()
        self._emptied = asyncio.Event()

    def take(self) -> tuple[list[TokenOutput], list[Refused]]:
        """What one frame may carry; the rest stays news."""
        outputs = self.outputs[:MAX_OUTPUTS_PER_FRAME]
        self.outputs = self.outputs[MAX_OUTPUTS_PER_FRAME:]
        refused, self.refused = self.refused, []
        if not self.outputs:
            self.news.clear()
            self._emptied.set()
        return outputs, refused

    async def wait_until_empty(self, timeout_s: float) -> None:
        """Wait until everything was taken, or until the timeout."""
        self._emptied.clear()
        if self.outputs or self.refused:
            await _wait(self._emptied, timeout_s)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """Wait for an event, but not longer than the timeout."""
    if event.is_set():
        return
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
