"""ControlServer and ControlClient over a real socket: calls, streams, deadlines, bad peers."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from xdeepserve.control import ControlClient, ControlServer, Peer
from xdeepserve.errors import (
    CapacityError,
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    RequestError,
    XDeepServeError,
)

TIMEOUT_S = 30.0


class Echo(msgspec.Struct, tag=True):
    text: str


class Count(msgspec.Struct, tag=True):
    upto: int
    fail_with: str = ""


class Hang(msgspec.Struct, tag=True):
    pass


class Blob(msgspec.Struct, tag=True):
    data: bytes


Message = Echo | Count | Hang | Blob


class Fixture:
    """A server whose handler does what the message says, and what it saw."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.notices: list[Any] = []
        self.noticed = asyncio.Event()
        self.lost: list[Peer] = []
        self.peer_lost = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.num_sent = 0
        self.server = ControlServer(
            path,
            self.handle,
            requests=Message,
            on_notice=self.on_notice,
            on_lost=self.on_lost,
            **options,
        )

    def handle(
        self, message: Message, peer: Peer
    ) -> Awaitable[msgspec.Struct] | AsyncGenerator[msgspec.Struct, None]:
        match message:
            case Count(upto, fail_with):
                return self.count(upto, fail_with)
            case Blob():
                return self.pour(message)
            case _:
                return self.reply(message)

    async def reply(self, message: Message) -> msgspec.Struct:
        if isinstance(message, Hang):
            try:
                await asyncio.sleep(TIMEOUT_S)
            finally:
                self.cancelled.set()
        if message == Echo("bad"):
            raise RequestError("bad text", code="bad", param="text")
        if message == Echo("bug"):
            raise ValueError("a bug")
        return message

    async def count(self, upto: int, fail_with: str) -> AsyncGenerator[msgspec.Struct, None]:
        try:
            for i in range(upto):
                yield Count(i)
            if fail_with:
                raise CapacityError(fail_with)
        finally:
            self.cancelled.set()

    async def pour(self, blob: Blob) -> AsyncGenerator[msgspec.Struct, None]:
        while True:
            self.num_sent += 1
            yield blob

    def on_notice(self, message: Any, peer: Peer) -> None:
        self.notices.append(message)
        self.noticed.set()

    def on_lost(self, peer: Peer) -> None:
        self.lost.append(peer)
        self.peer_lost.set()


async def connect(path: Path) -> ControlClient:
    return await ControlClient.connect(path, replies=Message, timeout_s=TIMEOUT_S)


@pytest.fixture
async def fixture(run_dir: Path) -> AsyncIterator[Fixture]:
    made = Fixture(run_dir / "s.sock", send_timeout_s=0.05)
    await made.server.start()
    yield made
    await made.server.close()


@pytest.fixture
async def client(fixture: Fixture) -> AsyncIterator[ControlClient]:
    made = await connect(fixture.server.path)
    yield made
    await made.close()


async def test_calls_run_side_by_side(client: ControlClient) -> None:
    texts = [f"t{i}" for i in range(20)]
    replies = await asyncio.gather(*(client.call(Echo(t), timeout_s=TIMEOUT_S) for t in texts))
    assert replies == [Echo(t) for t in texts]


async def test_a_stream_gives_everything_in_order_then_ends(client: ControlClient) -> None:
    items = [i.upto async for i in client.stream(Count(1000), item_timeout_s=TIMEOUT_S)]
    assert items == list(range(1000))


async def test_errors_of_handlers_reach_the_caller(client: ControlClient) -> None:
    with pytest.raises(RequestError) as caught:
        await client.call(Echo("bad"), timeout_s=TIMEOUT_S)
    assert (caught.value.message, caught.value.param) == ("bad text", "text")
    with pytest.raises(XDeepServeError, match="ValueError"):
        await client.call(Echo("bug"), timeout_s=TIMEOUT_S)
    stream = client.stream(Count(3, "full"), item_timeout_s=TIMEOUT_S)
    assert [await anext(stream) for _ in range(3)] == [Count(0), Count(1), Count(2)]
    with pytest.raises(CapacityError, match="full"):
        await anext(stream)
    assert await client.call(Echo("still here"), timeout_s=TIMEOUT_S) == Echo("still here")


async def test_a_call_past_its_deadline_is_cancelled_at_the_server(
    fixture: Fixture, client: ControlClient
) -> None:
    with pytest.raises(DeadlineExceeded):
        await client.call(Hang(), timeout_s=0.01)
    async with asyncio.timeout(TIMEOUT_S):
        await fixture.cancelled.wait()


async def test_closing_a_stream_early_cancels_it_at_the_server(
    fixture: Fixture, client: ControlClient
) -> None:
    stream = client.stream(Count(10**9), item_timeout_s=TIMEOUT_S)
    assert await anext(stream) == Count(0)
    await stream.aclose()
    async with asyncio.timeout(TIMEOUT_S):
        await fixture.cancelled.wait()
    assert await client.call(Echo("a"), timeout_s=TIMEOUT_S) == Echo("a")


async def test_notices_arrive_in_order(fixture: Fixture, client: ControlClient) -> None:
    for i in range(50):
        client.notify(Echo(str(i)))
    await client.call(Echo("barrier"), timeout_s=TIMEOUT_S)
    assert fixture.notices == [Echo(str(i)) for i in range(50)]


async def test_ping_is_answered_while_calls_hang(client: ControlClient) -> None:
    hanging = asyncio.create_task(client.call(Hang(), timeout_s=TIMEOUT_S))
    await client.ping(timeout_s=TIMEOUT_S)
    assert not hanging.done()
    hanging.cancel()
    await asyncio.gather(hanging, return_exceptions=True)


async def test_a_pause_of_the_one_who_pings_is_no_silence_of_the_server(
    client: ControlClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    pinging = asyncio.create_task(client.ping(timeout_s=TIMEOUT_S))
    await asyncio.sleep(0)
    before = loop.time
    monkeypatch.setattr(loop, "time", lambda: before() + 10 * TIMEOUT_S)
    await pinging


async def test_a_ping_of_a_server_that_hangs_has_an_end(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s.sock"))
    listener.listen()
    client = await connect(tmp_path / "s.sock")
    with pytest.raises(DeadlineExceeded, match=r"s\.sock did not answer in 0\.08 s"):
        await client.ping(timeout_s=0.08)
    pinging = asyncio.create_task(client.ping(timeout_s=TIMEOUT_S))
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(ConnectionLost):
        await pinging
    listener.close()


async def test_a_server_that_goes_away_fails_everything_under_way(
    fixture: Fixture, client: ControlClient
) -> None:
    hanging = asyncio.create_task(client.call(Hang(), timeout_s=TIMEOUT_S))
    await client.ping(timeout_s=TIMEOUT_S)
    await fixture.server.close()
    with pytest.raises(ConnectionLost):
        await hanging
    assert not client.is_connected
    with pytest.raises(ConnectionLost):
        await client.ping(timeout_s=TIMEOUT_S)
    with pytest.raises(ConnectionLost):
        client.notify(Echo("a"))
    with pytest.raises(ConnectionLost, match=r"s\.sock"):
        await connect(fixture.server.path)


async def test_a_lost_client_is_reported_once_with_its_identity(fixture: Fixture) -> None:
    client = await connect(fixture.server.path)
    await client.ping(timeout_s=TIMEOUT_S)
    await client.close()
    await client.close()
    async with asyncio.timeout(TIMEOUT_S):
        await fixture.peer_lost.wait()
    assert [(p.pid, p.uid) for p in fixture.lost] == [(os.getpid(), os.geteuid())]
    assert fixture.server.num_connections == 0


@pytest.mark.parametrize(
    "bytes_sent",
    [
        b"\xff\xff\xff\xff",
        struct.pack("<I", 4) + b"\xc1\xc1\xc1\xc1",
        b"\x05",
        struct.pack("<I", 5) + msgspec.msgpack.encode(["pong", 1])[:5],
        b"\x0e\x00\x00\x00" + msgspec.msgpack.encode(["call", 1, "wat"]).ljust(14, b"\xc0"),
    ],
    ids=["oversized", "garbage", "truncated", "wrong side", "trailing"],
)
async def test_a_peer_that_breaks_the_protocol_loses_only_its_own_connection(
    fixture: Fixture, client: ControlClient, bytes_sent: bytes
) -> None:
    reader, writer = await asyncio.open_unix_connection(str(fixture.server.path))
    writer.write(bytes_sent)
    writer.write_eof()
    async with asyncio.timeout(TIMEOUT_S):
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    assert await client.call(Echo("a"), timeout_s=TIMEOUT_S) == Echo("a")


async def test_a_wrong_message_fails_its_call_only(client: ControlClient) -> None:
    with pytest.raises(XDeepServeError, match="unexpected message"):
        await client.call(msgspec.defstruct("Odd", [("x", int)], tag=True)(1), timeout_s=TIMEOUT_S)
    assert await client.call(Echo("a"), timeout_s=TIMEOUT_S) == Echo("a")


async def test_a_peer_that_does_not_read_loses_its_connection(fixture: Fixture) -> None:
    client = await connect(fixture.server.path)
    stream = client.stream(Blob(b"x" * 100_000), item_timeout_s=TIMEOUT_S)
    await anext(stream)
    # Nothing is read any more: the client's buffer fills, then the socket, then the server's.
    async with asyncio.timeout(TIMEOUT_S):
        await fixture.peer_lost.wait()
    assert fixture.num_sent < 2000
    await stream.aclose()
    await client.close()


async def test_connections_are_bounded(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xdeepserve.control.server.MAX_CONNECTIONS", 1)
    first = await connect(fixture.server.path)
    await first.ping(timeout_s=TIMEOUT_S)
    second = await connect(fixture.server.path)
    with pytest.raises(ConnectionLost):
        await second.ping(timeout_s=TIMEOUT_S)
    await first.ping(timeout_s=TIMEOUT_S)
    await second.close()
    await first.close()


async def test_the_socket_is_private_and_goes_with_the_server(
    fixture: Fixture, run_dir: Path
) -> None:
    path = fixture.server.path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="another process listens"):
        await Fixture(path).server.start()
    await fixture.server.close()
    assert not path.exists()


async def test_a_socket_left_by_a_dead_process_is_replaced(run_dir: Path) -> None:
    path = run_dir / "s.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    fixture = Fixture(path)
    await fixture.server.start()
    client = await connect(path)
    await client.ping(timeout_s=TIMEOUT_S)
    await client.close()
    await fixture.server.close()


async def test_a_bug_in_reading_is_told_to_whoever_waits(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fixture = Fixture(run_dir / "s.sock")
    await fixture.server.start()
    client = await ControlClient.connect(fixture.server.path, replies=Message, timeout_s=TIMEOUT_S)

    async def fail(envelope: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(client, "_take", fail)
    with pytest.raises(ConnectionLost, match=r"reading from s\.sock failed: a bug"):
        await client.call(Echo("x"), timeout_s=TIMEOUT_S)
    assert "reading failed" in caplog.text
    await client.close()
    await fixture.server.close()


async def test_unsafe_places_are_refused(run_dir: Path) -> None:
    (run_dir / "file").touch()
    with pytest.raises(ConfigError, match="no socket"):
        await Fixture(run_dir / "file").server.start()
    with pytest.raises(ConfigError, match="limit is 107"):
        await Fixture(run_dir / ("x" * 120)).server.start()
    run_dir.chmod(0o755)
    with pytest.raises(ConfigError, match="mode 755"):
        await Fixture(run_dir / "s.sock").server.start()
