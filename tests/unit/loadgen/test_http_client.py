"""The HTTP client against scripted replies: framing, keep-alive, deadlines, typed errors."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from tests.unit.loadgen.fake_server import FakeRequest, FakeServer, Reply
from xdeepserve.errors import ConfigError
from xdeepserve.loadgen.http_client import HttpClient, parse_base_url
from xdeepserve.loadgen.http_connection import (
    BrokenResponse,
    ConnectFailed,
    HttpStatusError,
    ResponseTimeout,
    Timeouts,
)

IMPATIENT = Timeouts(connect_s=5.0, first_byte_s=0.01, between_bytes_s=0.01)


async def read_stream(client: HttpClient, path: str = "/s") -> bytes:
    async with contextlib.aclosing(client.stream(path, {})) as pieces:
        return b"".join([piece async for piece in pieces])


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://host:8000", ("host", 8000, False, "")),
        ("host:8000", ("host", 8000, False, "")),
        ("http://host/v1/", ("host", 80, False, "")),
        ("https://host/api/v1", ("host", 443, True, "/api")),
        ("http://[::1]:9", ("::1", 9, False, "")),
    ],
)
def test_base_url_is_parsed(url: str, expected: tuple[str, int, bool, str]) -> None:
    origin = parse_base_url(url)
    assert (origin.host, origin.port, origin.is_tls, origin.path_prefix) == expected


def test_ipv6_host_is_bracketed_in_the_host_header() -> None:
    assert parse_base_url("http://[::1]:9").authority == "[::1]:9"


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:99999", "http://host/a b"])
def test_bad_base_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="url"):
        parse_base_url(url)


@pytest.mark.parametrize("key", ["a\r\nX-Evil: 1", "schlüssel"])
def test_api_key_that_no_header_carries_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="header"):
        HttpClient("http://host", api_key=key)


async def test_request_line_headers_and_body_are_as_asked() -> None:
    async def echo(request: FakeRequest, reply: Reply) -> None:
        await reply.send_json(request.json)

    async with FakeServer(echo) as server, HttpClient(server.url, api_key="secret") as client:
        assert await client.post("/x", {"a": "é"}) == b'{"a": "\\u00e9"}'
    request = server.requests[0]
    assert (request.method, request.path) == ("POST", "/x")
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["host"] == server.url.removeprefix("http://")
    assert request.headers["content-type"] == "application/json"


async def test_connection_is_reused_after_a_complete_answer() -> None:
    async def reply_ok(request: FakeRequest, reply: Reply) -> None:
        await reply.send_json({})

    async with FakeServer(reply_ok) as server, HttpClient(server.url) as client:
        for _ in range(3):
            await client.get("/x")
    assert (len(server.requests), server.num_connections) == (3, 1)


async def test_connection_closed_while_idle_is_replaced() -> None:
    async def reply_once(request: FakeRequest, reply: Reply) -> None:
        await reply.send_json({})
        reply.cut()

    async with FakeServer(reply_once) as server, HttpClient(server.url) as client:
        assert await client.get("/x") == b"{}"
        assert await client.get("/x") == b"{}"
    assert server.num_connections == 2


async def test_stream_yields_pieces_as_they_arrive() -> None:
    go_on = asyncio.Event()

    async def handler(request: FakeRequest, reply: Reply) -> None:
        await reply.start_stream()
        await reply.piece(b"one")
        await go_on.wait()
        await reply.piece(b"two")
        await reply.raw(b"0\r\n\r\n")

    async with FakeServer(handler) as server, HttpClient(server.url) as client:
        seen = []
        async with contextlib.aclosing(client.stream("/s", {})) as pieces:
            async for piece in pieces:
                seen.append(piece)
                go_on.set()
    assert seen == [b"one", b"two"]


async def test_closing_a_stream_early_disconnects() -> None:
    async def handler(request: FakeRequest, reply: Reply) -> None:
        await reply.start_stream()
        while True:
            await reply.piece(b"x" * 1000)

    async with FakeServer(handler) as server, HttpClient(server.url) as client:
        async with contextlib.aclosing(client.stream("/s", {})) as pieces:
            await anext(pieces)
        async with asyncio.timeout(10):
            await server.disconnected.wait()


async def test_body_without_length_ends_with_the_connection() -> None:
    async def handler(request: FakeRequest, reply: Reply) -> None:
        await reply.raw(b"HTTP/1.1 200 OK\r\n\r\nhello")
        reply.cut()

    async with FakeServer(handler) as server, HttpClient(server.url) as client:
        assert await read_stream(client) == b"hello"


async def test_interim_answer_is_skipped() -> None:
    async def handler(request: FakeRequest, reply: Reply) -> None:
        await reply.raw(b"HTTP/1.1 100 Continue\r\n\r\n")
        await reply.send_json({"ok": 1})

    async with FakeServer(handler) as server, HttpClient(server.url) as client:
        assert await client.get("/x") == b'{"ok": 1}'


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_cut_or_garbled_answer_is_a_broken_response(sent: bytes) -> None:
    async def handler(request: FakeRequest, reply: Reply) -> None:
        await reply.raw(sent)
        reply.cut()

    async with FakeServer(handler) as server, HttpClient(server.url) as client:
        with pytest.raises(BrokenResponse):
            await read_stream(client)


@pytest.mark.parametrize(
    "begin",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx",
    ],
)
async def test_silence_ends_at_the_deadline(begin: bytes) -> None:
    never = asyncio.Event()

    async def handler(request: FakeRequest, reply: Reply) -> None:
        await reply.raw(begin)
        await never.wait()

    async with FakeServer(handler) as server, HttpClient(server.url, timeouts=IMPATIENT) as client:
        with pytest.raises(ResponseTimeout, match="silent"):
            await read_stream(client)


async def test_nobody_listening_is_connect_failed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    async with HttpClient(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(ConnectFailed, match="cannot connect to http://127"):
            await client.get("/x")


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        ({"error": {"message": "too long", "code": "context_length_exceeded"}}, "too long", "cont"),
        ({"error": "plain"}, "plain", None),
        ({"message": "old style"}, "old style", None),
        (b"<html>oops</html>", "<html>oops</html>", None),
    ],
)
async def test_error_status_carries_the_servers_words(
    body: object, message: str, code: str | None
) -> None:
    async def handler(request: FakeRequest, reply: Reply) -> None:
        await reply.send_json(body, status=400)

    async with FakeServer(handler) as server, HttpClient(server.url) as client:
        for _ in range(2):
            with pytest.raises(HttpStatusError, match=message) as caught:
                await read_stream(client)
            assert caught.value.status == 400
            assert (caught.value.code or "")[:4] == (code or "")
    assert server.num_connections == 1  # an error answer does not cost the connection
