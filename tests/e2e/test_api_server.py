"""The app under a real uvicorn: readiness, drain, signals, disconnects, header limits."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from tests.unit.maas.asgi import MODEL, open_app
from tests.unit.maas.replay_engine import ReplayEngine, steps_of
from xdeepserve.config import GatewayConfig
from xdeepserve.errors import ConfigError
from xdeepserve.maas.server import (
    MAX_HEADER_BYTES,
    BoundedHttpProtocol,
    DrainingServer,
    bind,
    make_server,
    url_of,
)

CONFIG = GatewayConfig(port=0)
STREAM = {"model": MODEL, "prompt": "hello", "stream": True}


@dataclass
class Running:
    """A server of this event loop."""

    server: DrainingServer
    engine: ReplayEngine
    port: int
    task: asyncio.Task[None]


@asynccontextmanager
async def _running(engine: ReplayEngine, config: GatewayConfig = CONFIG) -> AsyncIterator[Running]:
    is_ready = asyncio.Event()
    with bind(config) as listener:
        port = listener.getsockname()[1]
        server = make_server(open_app(engine, config=config), config, on_ready=is_ready.set)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        await is_ready.wait()
        try:
            yield Running(server, engine, port, task)
        finally:
            engine.gate.set()
            server.stop()
            server.stop()
            await task


class Connection:
    """One HTTP/1.1 connection, spoken by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def post(self, path: str, body: object) -> None:
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(raw)}\r\n\r\n"
        self.writer.write(head.encode() + raw)

    def get(self, path: str) -> None:
        head = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        self.writer.write(head.encode())

    async def status(self) -> int:
        return int((await self.reader.readline()).split()[1])

    async def rest(self) -> bytes:
        return await self.reader.read()


@asynccontextmanager
async def _connect(port: int) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


async def _get(port: int, path: str) -> int:
    async with _connect(port) as connection:
        connection.get(path)
        return await connection.status()


def test_port_in_use_is_one_clear_line() -> None:
    with bind(CONFIG) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}: Address already in use"):
            bind(GatewayConfig(port=port))


def test_foreign_address_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        bind(GatewayConfig(host="192.0.2.1", port=0))
    with pytest.raises(ConfigError, match=r"no\.such\.host\.invalid"):
        bind(GatewayConfig(host="no.such.host.invalid", port=0))


def test_url_of_both_families() -> None:
    with bind(CONFIG) as four:
        assert url_of(four) == f"http://127.0.0.1:{four.getsockname()[1]}"
    if socket.has_ipv6:
        with bind(GatewayConfig(host="::1", port=0)) as six:
            assert url_of(six) == f"http://[::1]:{six.getsockname()[1]}"


async def test_first_signal_drains_running_streams(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="xdeepserve.maas.server")
    engine = ReplayEngine(steps_of("x" * 60, step=1))
    async with _running(engine) as running, _connect(running.port) as stream:
        stream.post("/v1/completions", STREAM)
        assert await stream.status() == 200
        engine.gate.clear()
        assert await _get(running.port, "/ready") == 200
        os.kill(os.getpid(), signal.SIGTERM)
        while await _get(running.port, "/ready") != 503:
            await asyncio.sleep(0)
        async with _connect(running.port) as late:
            late.post("/v1/completions", STREAM)
            assert await late.status() == 503
        assert not running.task.done()
        assert "draining 1 request, at most 30 s; Ctrl-C again to stop now" in caplog.messages
        engine.gate.set()
        assert (await stream.rest()).rstrip().endswith(b"data: [DONE]\n\n\r\n0")
        await running.task
        assert engine.is_closed
        assert engine.aborted == []


@pytest.mark.parametrize("how", ["deadline", "second signal"])
async def test_what_does_not_finish_is_aborted_with_an_error(how: str) -> None:
    engine = ReplayEngine(steps_of("x" * 60, step=1))
    config = GatewayConfig(port=0, drain_timeout_s=0.0 if how == "deadline" else 1000.0)
    async with _running(engine, config) as running, _connect(running.port) as stream:
        stream.post("/v1/completions", STREAM)
        assert await stream.status() == 200
        engine.gate.clear()
        running.server.stop()
        if how == "second signal":
            running.server.stop()
        body = await stream.rest()
        assert b'"code":"aborted"' in body
        assert b"[DONE]" not in body
        await running.task
        assert engine.aborted == engine.closed == [engine.requests[0].request_id]


async def test_idle_server_stops_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="xdeepserve.maas.server")
    engine = ReplayEngine()
    async with _running(engine) as running:
        running.server.stop()
        await running.task
        assert engine.is_closed
    assert caplog.messages == []


@pytest.mark.parametrize("stream", [True, False])
async def test_closed_connection_frees_the_request(stream: bool) -> None:
    engine = ReplayEngine(steps_of("x" * 60, step=1))
    engine.gate.clear()
    async with _running(engine) as running:
        async with _connect(running.port) as connection:
            connection.post("/v1/completions", {**STREAM, "stream": stream})
            while not engine.requests:
                await asyncio.sleep(0)
        while not engine.closed:
            await asyncio.sleep(0)
        assert engine.aborted == [engine.requests[0].request_id]
        assert await _get(running.port, "/health") == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * (MAX_HEADER_BYTES // 6 + 1),
        b"GET / HTTP/1.1\r\na: " + b"x" * MAX_HEADER_BYTES,
        b"GET /" + b"x" * MAX_HEADER_BYTES,
        b"\x00\x01\x02 garbage\r\n\r\n",
    ],
    ids=["many headers", "long header", "long path", "garbage"],
)
async def test_bad_heads_are_cut_off(head: bytes) -> None:
    async with _running(ReplayEngine()) as running:
        async with _connect(running.port) as connection:
            connection.writer.write(head)
            assert await connection.status() == 400
        assert await _get(running.port, "/health") == 200


@pytest.mark.parametrize("head", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: localhost\r\n"])
async def test_unfinished_heads_are_closed(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedHttpProtocol, "head_timeout_s", 0.05)
    async with _running(ReplayEngine()) as running, _connect(running.port) as connection:
        connection.writer.write(head)
        assert await asyncio.wait_for(connection.rest(), 5) == b""


async def test_an_unfinished_second_head_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedHttpProtocol, "head_timeout_s", 0.05)
    async with _running(ReplayEngine()) as running, _connect(running.port) as connection:
        connection.writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET / HT")
        assert await connection.status() == 200
        await asyncio.wait_for(connection.rest(), 5)


async def test_a_long_body_is_no_long_header() -> None:
    engine = ReplayEngine(steps_of("ok"))
    async with _running(engine) as running, _connect(running.port) as connection:
        body = {"model": MODEL, "prompt": "x", "ignored": "y" * (4 * MAX_HEADER_BYTES)}
        for _ in range(2):
            connection.post("/v1/completions", body)
            assert await connection.status() == 200
            await connection.reader.readuntil(b"\r\n\r\n")
            await connection.reader.readuntil(b"}]}")
