"""ControlServer: answers calls on one unix socket, each in a task of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
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
    to_remote,
)
from xdeepserve.control.framing import DEFAULT_MAX_FRAME_BYTES, BodyDecoder, encode_body
from xdeepserve.control.unix_socket import Peer, bind_socket, peer_of
from xdeepserve.errors import (
    CapacityError,
    ConnectionLost,
    ProtocolError,
    XDeepServeError,
)

logger = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 64
MAX_CALLS_PER_CONNECTION: Final = 256
SEND_TIMEOUT_S: Final = 10.0
"""A peer that takes no byte for so long loses its connection."""

CLOSE_TIMEOUT_S: Final = 1.0
"""How long a closing connection may take to send what is buffered."""

Handler = Callable[[Any, Peer], Awaitable[msgspec.Struct] | AsyncGenerator[msgspec.Struct, None]]
"""(message, peer) -> an awaitable of the reply, or an async generator of a stream of replies."""

NoticeHandler = Callable[[Any, Peer], None]
LostHandler = Callable[[Peer], None]


def _no_notices(message: Any, peer: Peer) -> None:
    raise ProtocolError(f"this server takes no notices, got {type(message).__name__}")


def _nothing_to_do(peer: Peer) -> None:
    """The connection_lost of a server that keeps nothing per connection."""


class ControlServer:
    """A server on one event loop. Calls run in tasks; notices and pings in the reading loop.

    A peer that breaks the protocol, belongs to another user or does not read loses its connection;
    the others notice nothing.
    """

    def __init__(
        self,
        path: Path,
        handler: Handler,
        *,
        requests: Any,
        on_notice: NoticeHandler = _no_notices,
        on_lost: LostHandler = _nothing_to_do,
        max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
        send_timeout_s: float = SEND_TIMEOUT_S,
    ) -> None:
        """Make a server; `start` opens the socket.

        Args:
            path: of the socket; its folder must be ours with mode 0700.
            handler: answers a call. Errors of our tree reach the caller as they are.
            requests: the message types that peers may send: a tagged struct or a union of them.
            on_notice: takes messages that want no answer, in order; must not block.
            on_lost: called once per connection after it ended.
            max_frame_bytes: largest frame in either direction.
            send_timeout_s: a peer that reads nothing for so long loses its connection.
        """
        self.path = path
        self._handler = handler
        self._decoder = BodyDecoder(requests)
        self._on_notice = on_notice
        self._on_lost = on_lost
        self._max_frame_bytes = max_frame_bytes
        self._send_timeout_s = send_timeout_s
        self._server: asyncio.Server | None = None
        self._sessions: dict[asyncio.Task[None], _Session] = {}
        self._num_accepted = 0

    async def start(self) -> None:
        """Open the socket and accept connections.

        Raises:
            ConfigError: see `bind_socket`.
        """
        listener = bind_socket(self.path)
        self._server = await asyncio.start_unix_server(self._accept, sock=listener)

    async def close(self) -> None:
        """Stop listening, cancel all calls, flush and close connections, remove the socket.

        Idempotent.
        """
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        self.path.unlink(missing_ok=True)
        for task in list(self._sessions):
            task.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)

    @property
    def num_connections(self) -> int:
        """Connections open now."""
        return len(self._sessions)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = FramedConnection(reader, writer, max_frame_bytes=self._max_frame_bytes)
        task = asyncio.current_task()
        assert task is not None, "asyncio runs this callback in a task"
        try:
            peer = self._admit(writer)
        except XDeepServeError as exc:
            logger.warning("%s: connection refused: %s", self.path.name, exc.message)
            connection.abort()
            return
        session = _Session(self, peer, connection)
        self._sessions[task] = session
        try:
            await session.run()
        except asyncio.CancelledError:
            pass  # The server is closing; this task is awaited by nobody else.
        finally:
            del self._sessions[task]
            self._on_lost(peer)

    def _admit(self, writer: asyncio.StreamWriter) -> Peer:
        if len(self._sessions) >= MAX_CONNECTIONS:
            raise CapacityError(f"{MAX_CONNECTIONS} connections are open, the most there may be")
        self._num_accepted += 1
        return peer_of(writer.get_extra_info("socket"), connection_id=self._num_accepted)

    # -- used by sessions -----------------------------------------------------------------------

    def handle_notice(self, notice: Notice, peer: Peer) -> None:
        """Decode and deliver one notice."""
        self._on_notice(self._decoder.decode(notice.body), peer)

    async def answer(self, call: Call, peer: Peer, connection: FramedConnection) -> None:
        """Run the handler of one call and send what it gives."""
        try:
            answer = self._handler(self._decoder.decode(call.body), peer)
            if isinstance(answer, AsyncGenerator):
                await self._send_stream(call.call_id, answer, connection)
            else:
                reply = Reply(call.call_id, encode_body(await answer))
                await connection.send(reply, timeout_s=self._send_timeout_s)
        except ConnectionLost as exc:
            logger.info("%s: a reply has no reader: %s", self.path.name, exc.message)
        except Exception as exc:  # loop top: the caller gets the error, other calls go on
            if not isinstance(exc, XDeepServeError):
                logger.exception("%s: a call failed", self.path.name)
            self._post_failure(call.call_id, exc, connection)

    async def _send_stream(
        self,
        call_id: int,
        messages: AsyncGenerator[msgspec.Struct, None],
        connection: FramedConnection,
    ) -> None:
        try:
            async for message in messages:
                reply = Reply(call_id, encode_body(message))
                await connection.send(reply, timeout_s=self._send_timeout_s)
        finally:
            await messages.aclose()
        await connection.send(End(call_id), timeout_s=self._send_timeout_s)

    def _post_failure(self, call_id: int, error: Exception, connection: FramedConnection) -> None:
        try:
            connection.post(Failure(call_id, to_remote(error)))
        except XDeepServeError as exc:
            logger.info("%s: a failure has no reader: %s", self.path.name, exc.message)


class _Session:
    """One connection: reads envelopes, owns the tasks of its calls."""

    def __init__(self, server: ControlServer, peer: Peer, connection: FramedConnection) -> None:
        self._server = server
        self._peer = peer
        self._connection = connection
        self._calls: dict[int, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Serve until the peer goes away or breaks the protocol."""
        try:
            while (envelope := await self._connection.read()) is not None:
                self._take(envelope)
        except XDeepServeError as exc:
            logger.warning(
                "%s: connection of process %d closed: %s",
                self._server.path.name,
                self._peer.pid,
                exc.message,
            )
        finally:
            tasks = list(self._calls.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._connection.close(timeout_s=CLOSE_TIMEOUT_S)

    def _take(self, envelope: Envelope) -> None:
        match envelope:
            case Call():
                self._start_call(envelope)
            case Notice():
                self._server.handle_notice(envelope, self._peer)
            case Ping(nonce):
                self._connection.post(Pong(nonce))
            case Cancel(call_id):
                if (task := self._calls.get(call_id)) is not None:
                    task.cancel()
            case _:
                raise ProtocolError(f"a client sent {type(envelope).__name__}")

    def _start_call(self, call: Call) -> None:
        if call.call_id in self._calls:
            raise ProtocolError(f"call_id={call.call_id} is in use")
        if len(self._calls) >= MAX_CALLS_PER_CONNECTION:
            error = CapacityError(f"{MAX_CALLS_PER_CONNECTION} calls are open on this connection")
            self._connection.post(Failure(call.call_id, to_remote(error)))
            return
        task = asyncio.create_task(self._server.answer(call, self._peer, self._connection))
        self._calls[call.call_id] = task
        task.add_done_callback(lambda _: self._calls.pop(call.call_id, None))
