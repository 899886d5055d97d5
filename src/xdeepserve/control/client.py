"""ControlClient: calls one server over its unix socket; every wait has a deadline.

A lost connection fails everything under way with ConnectionLost and is not repaired: the caller
decides whether and when to connect again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import msgspec

from xdeepserve.control.connection import FramedConnection
from xdeepserve.control.envelope import (
    Call,
    Cancel,
    End,
    Envelope,
    Failure,
    Notice,
    Ping,
    Pong,
    Reply,
    fresh,
    to_local,
)
from xdeepserve.control.framing import DEFAULT_MAX_FRAME_BYTES, BodyDecoder, encode_body
from xdeepserve.control.unix_socket import Peer, peer_of
from xdeepserve.errors import ConnectionLost, DeadlineExceeded, ProtocolError, XDeepServeError

MAX_BUFFERED_REPLIES: Final = 256
"""Unread replies of one stream, beyond which the client stops reading its socket."""

_CLOSE_TIMEOUT_S: Final = 1.0
_NUM_PING_TICKS: Final = 8

logger = logging.getLogger(__name__)


class ControlClient:
    """One connection to a ControlServer; made by `connect`, used on one event loop."""

    def __init__(self, path: Path, connection: FramedConnection, peer: Peer, replies: Any) -> None:
        self.path = path
        self.peer = peer
        self._connection = connection
        self._decoder = BodyDecoder(replies)
        self._ids = itertools.count(1)
        self._exchanges: dict[int, _Exchange] = {}
        self._pings: dict[int, asyncio.Future[None]] = {}
        self._loss: XDeepServeError | None = None
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def connect(
        cls,
        path: Path,
        *,
        replies: Any,
        timeout_s: float,
        max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
    ) -> ControlClient:
        """Connect once.

        Args:
            path: the server's socket.
            replies: the message types the server may send: a tagged struct or a union of them.
            timeout_s: for the connection to be accepted.
            max_frame_bytes: largest frame in either direction.

        Raises:
            ConnectionLost: nobody listens there (yet).
            DeadlineExceeded: not accepted in time.
            ProtocolError: the server belongs to another user.
        """
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_unix_connection(str(path))
        except TimeoutError:
            raise DeadlineExceeded(f"{path} did not accept within {timeout_s} s") from None
        except OSError as exc:
            raise ConnectionLost(f"cannot connect to {path}: {exc}") from exc
        connection = FramedConnection(reader, writer, max_frame_bytes=max_frame_bytes)
        try:
            peer = peer_of(writer.get_extra_info("socket"), connection_id=0)
        except ProtocolError:
            connection.abort()
            raise
        return cls(path, connection, peer, replies)

    @property
    def is_connected(self) -> bool:
        """Whether the connection still stands, as far as is known."""
        return self._loss is None

    async def call(self, message: msgspec.Struct, *, timeout_s: float) -> Any:
        """Send a message and wait for its one reply.

        Raises:
            DeadlineExceeded: no reply in time; the server is told to stop.
            ConnectionLost: the server went away.
            XDeepServeError: what the handler raised.
        """
        exchange = self._open(message)
        try:
            reply = await exchange.next_reply(timeout_s)
            exchange.end()
            return reply
        finally:
            self._leave(exchange)

    async def stream(
        self, message: msgspec.Struct, *, item_timeout_s: float | None
    ) -> AsyncGenerator[Any, None]:
        """Send a message and iterate over its replies; closing early cancels the call.

        Args:
            message: starts the stream.
            item_timeout_s: longest wait for each reply; None when the caller watches the server by
                other means and closes the client.

        Raises:
            As `call`.
        """
        exchange = self._open(message)
        try:
            while (reply := await exchange.next_reply(item_timeout_s)) is not None:
                yield reply
        finally:
            self._leave(exchange)

    def notify(self, message: msgspec.Struct) -> None:
        """Send a message that wants no answer; never waits.

        Raises:
            ConnectionLost: the connection is gone, or the server does not read.
        """
        self._post(Notice(encode_body(message)))

    async def ping(self, *, timeout_s: float) -> None:
        """Ask whether the server's event loop runs.

        Args:
            timeout_s: counted in ticks of our own loop, so that a pause of this process does not
                look like one of the server.

        Raises:
            DeadlineExceeded: no answer in time.
            ConnectionLost: the server went away.
        """
        nonce = next(self._ids)
        answered = self._pings[nonce] = asyncio.get_running_loop().create_future()
        try:
            self._post(Ping(nonce))
            for _ in range(_NUM_PING_TICKS):
                await asyncio.wait({answered}, timeout=timeout_s / _NUM_PING_TICKS)
                if self._loss is not None:
                    raise fresh(self._loss)
                if answered.done():
                    return
            raise DeadlineExceeded(f"{self.path.name} did not answer in {timeout_s} s")
        finally:
            del self._pings[nonce]

    async def close(self) -> None:
        """Close the connection; whatever is under way gets ConnectionLost. Idempotent."""
        self._lose(ConnectionLost(f"the connection to {self.path.name} was closed"))
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._connection.close(timeout_s=_CLOSE_TIMEOUT_S)

    # -- exchanges ------------------------------------------------------------------------------

    def _open(self, message: msgspec.Struct) -> _Exchange:
        exchange = _Exchange(next(self._ids), self.path.name)
        self._post(Call(exchange.call_id, encode_body(message)))
        self._exchanges[exchange.call_id] = exchange
        return exchange

    def _leave(self, exchange: _Exchange) -> None:
        del self._exchanges[exchange.call_id]
        exchange.has_room.set()
        if not exchange.is_over:
            with contextlib.suppress(XDeepServeError):
                self._post(Cancel(exchange.call_id))

    def _post(self, envelope: Envelope) -> None:
        if self._loss is not None:
            raise fresh(self._loss)
        try:
            self._connection.post(envelope)
        except ConnectionLost as exc:
            self._lose(exc)
            raise

    # -- reading --------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Deliver replies until the connection ends; waits while a stream's reader lags."""
        try:
            while (envelope := await self._connection.read()) is not None:
                await self._take(envelope)
            self._lose(ConnectionLost(f"{self.path.name} closed the connection"))
        except XDeepServeError as exc:
            self._lose(exc)
        except Exception as exc:  # loop top: whoever waits for a reply is told
            logger.exception("%s: reading failed", self.path.name)
            self._lose(ConnectionLost(f"reading from {self.path.name} failed: {exc}"))
        finally:
            self._connection.abort()

    async def _take(self, envelope: Envelope) -> None:
        match envelope:
            case Reply(call_id, body):
                if (exchange := self._exchanges.get(call_id)) is not None:
                    await exchange.push(self._decoder.decode(body))
            case End(call_id):
                if (exchange := self._exchanges.get(call_id)) is not None:
                    exchange.end()
            case Failure(call_id, error):
                if (exchange := self._exchanges.get(call_id)) is not None:
                    exchange.fail(to_local(error))
            case Pong(nonce):
                if (answered := self._pings.get(nonce)) is not None and not answered.done():
                    answered.set_result(None)
            case _:
                raise ProtocolError(f"a server sent {type(envelope).__name__}")

    def _lose(self, loss: XDeepServeError) -> None:
        if self._loss is not None:
            return
        self._loss = loss
        for exchange in self._exchanges.values():
            exchange.fail(loss)
        for answered in self._pings.values():
            answered.cancel()


class _Exchange:
    """The replies of one call, between the reading task and the caller."""

    def __init__(self, call_id: int, server_name: str) -> None:
        self.call_id = call_id
        self.is_over = False
        self.has_room = asyncio.Event()
        self.has_room.set()
        self._server_name = server_name
        self._replies: deque[Any] = deque()
        self._error: XDeepServeError | None = None
        self._news = asyncio.Event()

    async def push(self, message: Any) -> None:
        """Add a reply; waits while the caller has too many unread ones."""
        self._replies.append(message)
        self._news.set()
        if len(self._replies) >= MAX_BUFFERED_REPLIES:
            self.has_room.clear()
        await self.has_room.wait()

    def end(self) -> None:
        """The server has nothing more to say."""
        self.is_over = True
        self._news.set()

    def fail(self, error: XDeepServeError) -> None:
        """End the call with an error, after the replies that came before it."""
        self._error = self._error or error
        self.end()

    async def next_reply(self, timeout_s: float | None) -> Any:
        """The next reply; None at the end of a stream."""
        if not self._replies and not self.is_over:
            await self._wait(timeout_s)
        if self._replies:
            reply = self._replies.popleft()
            self.has_room.set()
            return reply
        if self._error is not None:
            raise fresh(self._error)
        return None

    async def _wait(self, timeout_s: float | None) -> None:
        self._news.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            raise DeadlineExceeded(
                f"{self._server_name} did not answer within {timeout_s} s"
            ) from None
