"""One HTTP/1.1 connection of the client: framing by httptools, a deadline on every wait.

Owns the socket and the state of one response; the typed errors of the client side live here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Final

import httptools

from xdeepserve.errors import XDeepServeError

READ_BYTES: Final = 1 << 16


class ClientError(XDeepServeError):
    """The server cannot be reached, or its answer cannot be used."""


class ConnectFailed(ClientError):
    """No connection: wrong address, nobody listening, TLS failure or deadline."""


class ResponseTimeout(ClientError):
    """The server accepted the request but stayed silent beyond the deadline."""


class BrokenResponse(ClientError):
    """The answer ended early or is not what the protocol allows."""


class HttpStatusError(ClientError):
    """The server answered with an error; `status` and `code` are the server's own."""

    def __init__(self, message: str, *, status: int, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Deadlines of one request in seconds.

    Attributes:
        connect_s: TCP and TLS handshake.
        first_byte_s: from the request sent to the first byte of the body.
        between_bytes_s: longest silence inside the body.
    """

    connect_s: float = 10.0
    first_byte_s: float = 600.0
    between_bytes_s: float = 120.0


class _Response:
    """Callback target of the httptools parser: what has arrived of one response."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.has_headers = False
        self.is_complete = False
        self.keeps_alive = False
        self.has_length = False
        self.pieces: list[bytes] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self.has_length = True

    def on_headers_complete(self) -> None:
        self.has_headers = self.status >= 200

    def on_body(self, body: bytes) -> None:
        self.pieces.append(body)

    def on_message_complete(self) -> None:
        # A 1xx answer is complete in itself and only announces the real one.
        self.is_complete = self.has_headers
        self.keeps_alive = self.parser.should_keep_alive()  # forgotten by the parser after this

    @property
    def status(self) -> int:
        return self.parser.get_status_code()

    def take_body(self) -> bytes:
        """The body bytes that arrived since the last call."""
        body = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        self.pieces.clear()
        return body


class HttpConnection:
    """One connection: sends a request at a time and reads its response."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, timeouts: Timeouts
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._timeouts = timeouts
        self._response = _Response()
        self._first_byte_deadline = 0.0

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def is_reusable(self) -> bool:
        """Whether the response was read to its end and the server keeps the connection."""
        return self._response.is_complete and self._response.keeps_alive

    @property
    def is_closed_by_peer(self) -> bool:
        return self._reader.at_eof() or self._writer.is_closing()

    async def request(self, payload: bytes) -> None:
        """Send a whole request and read the response's headers.

        Raises:
            BrokenResponse: the peer closed before a complete header.
            ResponseTimeout: no header until the first-byte deadline.
        """
        self._response = _Response()
        now = asyncio.get_running_loop().time()
        self._first_byte_deadline = now + self._timeouts.first_byte_s
        try:
            self._writer.write(payload)
            async with asyncio.timeout_at(self._first_byte_deadline):
                await self._writer.drain()
        except TimeoutError as exc:
            raise ResponseTimeout("the server does not read the request") from exc
        except OSError as exc:
            raise BrokenResponse(f"connection lost while sending: {exc}") from exc
        while not self._response.has_headers:
            await self._read_more(self._first_byte_deadline)

    async def body(self) -> AsyncGenerator[bytes]:
        """Yield the body as it arrives, one piece for each network read."""
        response = self._response
        deadline = self._first_byte_deadline
        loop = asyncio.get_running_loop()
        while True:
            if response.pieces:
                yield response.take_body()
                deadline = loop.time() + self._timeouts.between_bytes_s
            if response.is_complete:
                return
            await self._read_more(deadline)

    async def _read_more(self, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                data = await self._reader.read(READ_BYTES)
        except TimeoutError as exc:
            raise ResponseTimeout("the server stayed silent beyond the deadline") from exc
        except OSError as exc:
            raise BrokenResponse(f"connection lost: {exc}") from exc
        if data:
            self._feed(data)
        elif self._response.has_headers and not self._response.has_length:
            self._response.is_complete = True  # a body that ends with the connection
        else:
            raise BrokenResponse("the server closed the connection in the middle of an answer")

    def _feed(self, data: bytes) -> None:
        try:
            self._response.parser.feed_data(data)
        except httptools.HttpParserError as exc:
            raise BrokenResponse(f"the answer is not HTTP: {exc}") from exc

    def close(self) -> None:
        """Drop the connection at once; a running request is abandoned."""
        self._writer.close()

    async def wait_closed(self) -> None:
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
