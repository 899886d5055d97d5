"""A small asyncio HTTP/1.1 client: JSON requests and streamed bodies over kept-alive connections.

Owns the pool of idle connections; knows nothing of SSE or of OpenAI's chunks. It is made for load
generation beside the server it measures, so one network read costs one wake-up.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import msgspec

from xdeepserve.errors import ConfigError
from xdeepserve.loadgen.http_connection import (
    BrokenResponse,
    ConnectFailed,
    HttpConnection,
    HttpStatusError,
    Timeouts,
)

MAX_BODY_BYTES: Final = 64 << 20
MAX_ERROR_TEXT: Final = 500


@dataclass(frozen=True, slots=True)
class Origin:
    """A parsed base URL: where to connect and the path in front of `/v1`."""

    host: str
    port: int
    is_tls: bool
    path_prefix: str

    def __str__(self) -> str:
        return f"{'https' if self.is_tls else 'http'}://{self.authority}{self.path_prefix}"

    @property
    def authority(self) -> str:
        """`host:port` for the Host header; IPv6 addresses in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_base_url(url: str) -> Origin:
    """`http://host:port` or `https://...`, with or without a trailing `/v1`.

    Raises:
        ConfigError: another scheme, no host, or a port out of range.
    """
    text = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as exc:
        raise ConfigError(f"url {url!r}: {exc}") from exc
    is_usable = _is_header_text(parts.path) and " " not in parts.path
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_usable:
        raise ConfigError(f"url {url!r} must look like http://host:port")
    is_tls = parts.scheme == "https"
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return Origin(parts.hostname, port or (443 if is_tls else 80), is_tls, prefix)


def _is_header_text(text: str) -> bool:
    return text.isascii() and text.isprintable()


class HttpClient:
    """Requests to one server over kept-alive connections; for use on one event loop.

    Connections are opened as needed, one per request under way, and reused afterwards.
    """

    def __init__(
        self, base_url: str, *, api_key: str | None = None, timeouts: Timeouts | None = None
    ) -> None:
        self.origin = parse_base_url(base_url)
        self._timeouts = timeouts or Timeouts()
        self._tls = ssl.create_default_context() if self.origin.is_tls else None
        self._idle: list[HttpConnection] = []
        if api_key and not _is_header_text(api_key):
            raise ConfigError("the API key contains characters that a header cannot carry")
        auth = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._fixed_headers = (
            f"Host: {self.origin.authority}\r\nUser-Agent: xdeepserve-loadgen\r\n{auth}"
            "Accept: application/json, text/event-stream\r\nContent-Type: application/json\r\n"
        )

    async def __aenter__(self) -> HttpClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def get(self, path: str) -> bytes:
        """Body of `GET path`.

        Raises:
            ClientError: see the subclasses; HttpStatusError for any status but 2xx.
        """
        async with self._exchange("GET", path, b"") as connection:
            return await _read_all(connection)

    async def post(self, path: str, body: object) -> bytes:
        """Body of `POST path` with `body` as JSON. Raises as `get`."""
        async with self._exchange("POST", path, msgspec.json.encode(body)) as connection:
            return await _read_all(connection)

    async def stream(self, path: str, body: object) -> AsyncGenerator[bytes]:
        """Yield the body of `POST path` as it arrives, one piece for each network read.

        Closing the generator early (use `contextlib.aclosing`) closes the connection, which tells
        the server to abort. Raises as `get`, and BrokenResponse when the body is cut.
        """
        async with (
            self._exchange("POST", path, msgspec.json.encode(body)) as connection,
            contextlib.aclosing(connection.body()) as pieces,
        ):
            async for piece in pieces:
                yield piece

    async def close(self) -> None:
        """Close the idle connections. Idempotent."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        for connection in idle:
            await connection.wait_closed()

    @asynccontextmanager
    async def _exchange(self, method: str, path: str, body: bytes) -> AsyncIterator[HttpConnection]:
        connection = await self._send(self._encode(method, path, body))
        try:
            if not 200 <= connection.status < 300:
                raise _status_error(connection.status, await _read_all(connection))
            yield connection
        finally:
            if connection.is_reusable:
                self._idle.append(connection)
            else:
                connection.close()

    def _encode(self, method: str, path: str, body: bytes) -> bytes:
        head = (
            f"{method} {self.origin.path_prefix}{path} HTTP/1.1\r\n{self._fixed_headers}"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode("latin-1") + body

    async def _send(self, payload: bytes) -> HttpConnection:
        """Send on an idle connection or, if the server has closed those meanwhile, a new one."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed_by_peer:
                with contextlib.suppress(BrokenResponse):
                    return await _request_or_close(connection, payload)
            connection.close()
        return await _request_or_close(await self._connect(), payload)

    async def _connect(self) -> HttpConnection:
        origin = self.origin
        try:
            async with asyncio.timeout(self._timeouts.connect_s):
                reader, writer = await asyncio.open_connection(
                    origin.host, origin.port, ssl=self._tls
                )
        except TimeoutError as exc:
            raise ConnectFailed(
                f"no connection to {origin} within {self._timeouts.connect_s:g} s"
            ) from exc
        except (OSError, ValueError) as exc:  # ValueError: a host name that IDNA refuses
            raise ConnectFailed(f"cannot connect to {origin}: {exc}") from exc
        return HttpConnection(reader, writer, self._timeouts)


async def _request_or_close(connection: HttpConnection, payload: bytes) -> HttpConnection:
    has_headers = False
    try:
        await connection.request(payload)
        has_headers = True
        return connection
    finally:
        if not has_headers:
            connection.close()


async def _read_all(connection: HttpConnection) -> bytes:
    pieces: list[bytes] = []
    size = 0
    async with contextlib.aclosing(connection.body()) as body:
        async for piece in body:
            size += len(piece)
            if size > MAX_BODY_BYTES:
                raise BrokenResponse(f"the answer is longer than {MAX_BODY_BYTES} bytes")
            pieces.append(piece)
    return b"".join(pieces)


class _ErrorDetail(msgspec.Struct):
    message: str = ""
    code: str | int | None = None


class _ErrorBody(msgspec.Struct):
    error: _ErrorDetail | str | None = None
    message: str | None = None


def _status_error(status: int, body: bytes) -> HttpStatusError:
    """The server's own words where the body is an OpenAI error, else the start of the body."""
    text, code = body.decode("utf-8", "replace").strip(), None
    with contextlib.suppress(msgspec.MsgspecError):
        parsed = msgspec.json.decode(body, type=_ErrorBody)
        if isinstance(parsed.error, _ErrorDetail):
            text = parsed.error.message or text
            code = None if parsed.error.code is None else str(parsed.error.code)
        else:
            text = parsed.error or parsed.message or text
    return HttpStatusError(f"HTTP {status}: {text[:MAX_ERROR_TEXT]}", status=status, code=code)
