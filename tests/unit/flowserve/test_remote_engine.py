"""DPServer and RemoteEngine: every way the link, the group or the gateway can fail."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.flowserve.builders import make_config, make_executor, make_group, make_request
from tests.unit.flowserve.fake_engine import INFO
from tests.unit.flowserve.test_dp_group import Gate
from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.control import ControlClient, ControlServer, Peer, to_remote
from xdeepserve.errors import CapacityError, DeadlineExceeded, EngineDeadError, RequestError
from xdeepserve.flowserve.dp_messages import (
    Abort,
    Attach,
    Attached,
    DPStatus,
    Events,
    FromGateway,
    FromGroup,
    GetStatus,
    Refused,
    Submit,
)
from xdeepserve.flowserve.dp_server import DPServer
from xdeepserve.flowserve.remote_engine import LinkTimes, RemoteEngine
from xdeepserve.messages import FinishReason, LoadReport, TokenOutput, Usage
from xdeepserve.testing.scripted_executor import ScriptedExecutor, scripted_output

TIMEOUT_S = 30.0
QUICK = LinkTimes(silence_s=0.08, retry_s=0.01, abort_s=0.01)


class Group:
    """A real group behind a real socket."""

    def __init__(self, path: Path, gate: Gate | None = None, **config: Any) -> None:
        made = make_config(**config)
        self.executor: ScriptedExecutor = make_executor(made, gate)
        self.group = make_group(made, self.executor, clock=SYSTEM_CLOCK)
        self.server = DPServer(self.group, path, report_interval_s=0.01)
        self.path = path


@pytest.fixture
async def group(tmp_path: Path) -> AsyncIterator[Group]:
    made = Group(tmp_path / "dp0.sock")
    await made.server.start()
    yield made
    await made.server.close(drain_timeout_s=0.0)


async def connect(path: Path, times: LinkTimes | None = None) -> RemoteEngine:
    return await RemoteEngine.connect(path, timeout_s=TIMEOUT_S, times=times or LinkTimes())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0)


async def collect(stream: AsyncIterator[TokenOutput]) -> list[TokenOutput]:
    async with asyncio.timeout(TIMEOUT_S):
        return [output async for output in stream]


# -- the server -----------------------------------------------------------------------------------


async def test_a_lost_gateway_leaves_nothing_running(tmp_path: Path) -> None:
    gate = Gate()
    group = Group(tmp_path / "dp0.sock", gate)
    await group.server.start()
    engine = await connect(group.path)
    streams = [engine.generate(request=make_request(f"r{i}", max_tokens=60)) for i in range(3)]
    await gate.until_entered()
    engine._client._connection.abort()
    for stream in streams:
        with pytest.raises(EngineDeadError, match="dp0 is gone"):
            await collect(stream)
    await until(lambda: not group.server._owners)
    gate.open()
    await until(lambda: group.group.load().num_running + group.group.load().num_waiting == 0)
    load = group.group.load()
    assert load.num_free_blocks == load.num_total_blocks
    assert load.num_generated_tokens < 180
    await until(engine.is_alive)
    outputs = await collect(engine.generate(request=make_request("r0")))
    assert [i for o in outputs for i in o.token_ids] == scripted_output([5, 6, 7], 4)
    await engine.close(drain_timeout_s=0.0)
    await group.server.close(drain_timeout_s=0.0)


async def test_a_bug_does_not_cut_a_group_off_for_good(
    group: Group, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = await connect(group.path, QUICK)
    take = engine._take

    def fail_once(events: Events) -> None:
        monkeypatch.setattr(engine, "_take", take)
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine, "_take", fail_once)
    await until(lambda: "the connection failed" in caplog.text)
    await until(engine.is_alive)
    await collect(engine.generate(request=make_request("a")))
    await engine.close(drain_timeout_s=0.0)


async def test_a_disconnection_that_is_meant_is_no_warning(
    group: Group, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine = await connect(group.path)
    engine._client._connection.abort()
    await until(lambda: "is lost with" in caplog.text)
    await until(engine.is_alive)
    await engine.close(drain_timeout_s=0.0)
    lost = [record.levelname for record in caplog.records if "is lost with" in record.message]
    assert lost == ["WARNING", "INFO"]


async def test_a_gateway_that_does_not_read_is_given_up(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xdeepserve.flowserve.dp_server.MAX_UNSENT_OUTPUTS", 8)
    client = await ControlClient.connect(group.path, replies=FromGroup, timeout_s=TIMEOUT_S)
    client.notify(Submit(make_request("a", max_tokens=60)))
    await until(lambda: group.server._outboxes[1].is_given_up if group.server._outboxes else False)
    await until(lambda: group.group.load().num_running == 0)
    assert group.server._outboxes[1].outputs == []
    stream = client.stream(Attach(), item_timeout_s=TIMEOUT_S)
    assert isinstance(await anext(stream), Attached)
    with pytest.raises(CapacityError, match="8 outputs wait unread"):
        await anext(stream)
    await client.close()


async def test_a_burst_travels_in_bounded_frames(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xdeepserve.flowserve.dp_server.MAX_OUTPUTS_PER_FRAME", 2)
    client = await ControlClient.connect(group.path, replies=FromGroup, timeout_s=TIMEOUT_S)
    client.notify(Submit(make_request("a", max_tokens=9)))
    client.notify(Submit(make_request("bad", [])))
    await until(lambda: bool(group.server._outboxes))
    await until(lambda: len(group.server._outboxes[1].outputs) == 9)
    ids: list[int] = []
    refused: list[Refused] = []
    async for message in client.stream(Attach(), item_timeout_s=TIMEOUT_S):
        if isinstance(message, Events):
            assert len(message.outputs) <= 2
            assert message.num_received == 2
            refused += message.refused
            ids += [i for output in message.outputs for i in output.token_ids]
        if len(ids) == 9:
            break
    assert ids == scripted_output([5, 6, 7], 9)
    assert [r.request_id for r in refused] == ["bad"]
    await client.close()


async def test_a_connection_cannot_touch_the_requests_of_another(tmp_path: Path) -> None:
    gate = Gate()
    group = Group(tmp_path / "dp0.sock", gate)
    await group.server.start()
    engine = await connect(group.path)
    stream = engine.generate(request=make_request("a"))
    await gate.until_entered()
    other = await ControlClient.connect(group.path, replies=FromGroup, timeout_s=TIMEOUT_S)
    other.notify(Abort("a"))
    status = await other.call(GetStatus(), timeout_s=TIMEOUT_S)
    assert isinstance(status, DPStatus)
    assert (status.load.num_running, status.num_connections) == (1, 2)
    with pytest.raises(RequestError, match="Abort is a notice"):
        await other.call(Abort("a"), timeout_s=TIMEOUT_S)
    await other.close()
    gate.open()
    assert (await collect(stream))[-1].finish_reason is FinishReason.LENGTH
    await engine.close(drain_timeout_s=0.0)
    await group.server.close(drain_timeout_s=0.0)


async def test_close_drains_and_the_last_outputs_arrive(tmp_path: Path) -> None:
    gate = Gate()
    group = Group(tmp_path / "dp0.sock", gate)
    await group.server.start()
    engine = await connect(group.path)
    stream = engine.generate(request=make_request("a"))
    await gate.until_entered()
    closing = asyncio.create_task(group.server.close(drain_timeout_s=TIMEOUT_S))
    await asyncio.sleep(0)
    gate.open()
    outputs = await collect(stream)
    assert [i for o in outputs for i in o.token_ids] == scripted_output([5, 6, 7], 4)
    await closing
    await until(lambda: not engine.is_alive())
    assert group.executor.is_closed
    assert not group.path.exists()
    await engine.close(drain_timeout_s=0.0)


async def test_a_dead_step_loop_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    group = Group(tmp_path / "dp0.sock")
    await group.server.start()
    engine = await connect(group.path)
    group.executor.fail_with = RuntimeError("out of luck")
    with caplog.at_level(logging.CRITICAL, logger="xdeepserve.flowserve.dp_group"):
        outputs = await collect(engine.generate(request=make_request("a")))
    assert outputs[-1].finish_reason is FinishReason.ERROR
    assert not engine.is_alive()
    with pytest.raises(EngineDeadError, match="not running"):
        engine.generate(request=make_request("b"))
    await engine.close(drain_timeout_s=0.0)
    await group.server.close(drain_timeout_s=0.0)


# -- the client, against a scripted peer ----------------------------------------------------------


class Peerless:
    """A group that says only what the test puts into `events`."""

    def __init__(self, path: Path) -> None:
        self.info = INFO
        self.events: asyncio.Queue[Events] = asyncio.Queue()
        self.notices: list[Any] = []
        self.server = ControlServer(
            path, self.handle, requests=FromGateway, on_notice=self.on_notice
        )

    def handle(
        self, message: FromGateway, peer: Peer
    ) -> Awaitable[msgspec.Struct] | AsyncGenerator[msgspec.Struct, None]:
        return self.stream()

    async def stream(self) -> AsyncGenerator[msgspec.Struct, None]:
        yield Attached(self.info)
        while True:
            yield await self.events.get()

    def on_notice(self, message: Any, peer: Peer) -> None:
        self.notices.append(message)

    def say(self, *outputs: TokenOutput, num_received: int = 0, **fields: Any) -> None:
        load = LoadReport(num_running=0, num_waiting=0, num_free_blocks=60, num_total_blocks=64)
        defaults = {"refused": [], "load": load, "is_alive": True}
        events = Events(outputs=list(outputs), num_received=num_received, **(defaults | fields))
        self.events.put_nowait(events)


@pytest.fixture
async def peer(tmp_path: Path) -> AsyncIterator[Peerless]:
    made = Peerless(tmp_path / "dp0.sock")
    await made.server.start()
    yield made
    await made.server.close()


async def test_submitted_requests_count_until_a_report_counts_them(peer: Peerless) -> None:
    engine = await connect(peer.server.path)
    streams = [engine.generate(request=make_request(f"r{i}", [5] * 9)) for i in range(3)]
    load = engine.load()
    assert (load.num_waiting, load.num_reserved_blocks) == (3, 9)
    peer.say(num_received=2)
    await until(lambda: engine.load().num_waiting == 1)
    assert engine.load().num_reserved_blocks == 3
    assert engine.load().kv_demand == (4 + 3) / 64
    await until(lambda: len(peer.notices) == 3)
    assert [n.request.request_id for n in peer.notices] == ["r0", "r1", "r2"]
    await streams[0].aclose()
    await until(lambda: peer.notices[-1] == Abort("r0"))
    await engine.close(drain_timeout_s=0.0)


async def test_a_late_refusal_is_raised_by_the_stream(peer: Peerless) -> None:
    engine = await connect(peer.server.path)
    stream = engine.generate(request=make_request("a"))
    peer.say(num_received=1, refused=[Refused("a", to_remote(CapacityError("full")))])
    with pytest.raises(CapacityError, match="full"):
        await collect(stream)
    assert await collect(stream) == []
    await engine.close(drain_timeout_s=TIMEOUT_S)


async def test_a_silent_group_is_lost_and_what_it_said_before_counts(
    peer: Peerless, caplog: pytest.LogCaptureFixture
) -> None:
    engine = await connect(peer.server.path, QUICK)
    stream = engine.generate(request=make_request("a"))
    peer.say(TokenOutput(request_id="a", token_ids=[9], usage=Usage(3, 0, 1)), num_received=1)
    with caplog.at_level(logging.WARNING):
        assert (await anext(stream)).token_ids == [9]
        with pytest.raises(EngineDeadError, match="dp0 is gone"):
            await anext(stream)
    assert "said nothing" in caplog.text
    await engine.close(drain_timeout_s=0.0)


async def test_counters_go_on_over_a_restart_and_another_model_is_not_taken(
    peer: Peerless, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = await connect(peer.server.path, QUICK)
    busy = LoadReport(
        num_running=2, num_waiting=1, num_free_blocks=1, num_total_blocks=64, num_steps=7
    )
    peer.say(load=busy)
    await until(lambda: engine.load().num_steps == 7)
    lost = engine.generate(request=make_request("a"))
    await peer.server.close()
    await until(lambda: not engine.is_alive())
    gone = engine.load()
    assert (gone.num_steps, gone.num_running, gone.num_waiting) == (7, 0, 0)
    assert (gone.num_total_blocks, gone.num_reserved_blocks) == (0, 0)
    with pytest.raises(EngineDeadError):
        await collect(lost)
    successor = Peerless(peer.server.path)
    successor.info = msgspec.structs.replace(INFO, model="another")
    with caplog.at_level(logging.ERROR):
        await successor.server.start()
        await until(lambda: "came back as" in caplog.text)
    assert not engine.is_alive()
    successor.info = INFO
    await until(engine.is_alive)
    successor.say(load=msgspec.structs.replace(busy, num_steps=3))
    await until(lambda: engine.load().num_steps == 10)
    await engine.close(drain_timeout_s=0.0)
    await successor.server.close()


async def test_a_group_that_never_comes_up_is_a_deadline(tmp_path: Path) -> None:
    with pytest.raises(DeadlineExceeded, match="dp7 did not start within"):
        await RemoteEngine.connect(tmp_path / "dp7.sock", timeout_s=0.02, times=QUICK)
