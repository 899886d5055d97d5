"""DPGroup and InProcClient: the loop, its threads, and every way it can end."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.unit.flowserve.builders import make_config, make_executor, make_group, make_request
from xdeepserve.errors import CapacityError, EngineDeadError, RequestError
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.flowserve.engine_client import InProcClient
from xdeepserve.flowserve.step import ScheduledRequest
from xdeepserve.messages import FinishReason, TokenOutput
from xdeepserve.testing.fake_clock import FakeClock
from xdeepserve.testing.scripted_executor import (
    ScriptedExecutor,
    next_scripted_id,
    scripted_output,
)

TIMEOUT_S = 30.0


class Gate:
    """A script that holds the step loop inside `execute` until the test lets it go."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.let_go = threading.Semaphore(0)
        self.is_open = False

    def __call__(self, item: ScheduledRequest) -> int:
        if not self.is_open:
            self.entered.release()
            assert self.let_go.acquire(timeout=TIMEOUT_S)
        return next_scripted_id(item.token_ids)

    async def until_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=TIMEOUT_S)

    def open(self) -> None:
        self.is_open = True
        self.let_go.release()


class Engine:
    """A client with its parts in reach."""

    def __init__(self, gate: Gate | None = None, **config: Any) -> None:
        self.config = make_config(**config)
        self.clock = FakeClock()
        self.executor: ScriptedExecutor = make_executor(self.config, gate)
        self.group: DPGroup = make_group(self.config, self.executor, clock=self.clock)
        self.client = InProcClient(self.group)

    async def __aenter__(self) -> Engine:
        self.client.start()
        return self

    async def __aexit__(self, *args: object) -> None:
        await self.client.close(drain_timeout_s=0.0)
        assert self.executor.is_closed


async def collect(stream: AsyncIterator[TokenOutput]) -> list[TokenOutput]:
    async with asyncio.timeout(TIMEOUT_S):
        return [output async for output in stream]


async def test_an_abort_during_execute_wins_over_its_tokens() -> None:
    gate = Gate()
    async with Engine(gate) as engine:
        stream = engine.client.generate(request=make_request("a", max_tokens=9))
        await gate.until_entered()
        await engine.client.abort(request_id="a")
        gate.open()
        outputs = await collect(stream)
    assert [o.finish_reason for o in outputs] == [FinishReason.ABORT]
    assert outputs[0].usage.num_output_tokens == 0


async def test_the_waiting_queue_is_bounded() -> None:
    gate = Gate()
    async with Engine(gate, max_num_seqs=1, max_num_waiting=2) as engine:
        streams = [engine.client.generate(request=make_request("r0"))]
        await gate.until_entered()
        streams += [engine.client.generate(request=make_request(f"r{i}")) for i in (1, 2)]
        with pytest.raises(CapacityError, match="max_num_waiting=2"):
            engine.client.generate(request=make_request("r3"))
        assert engine.client.load().num_waiting >= 2
        gate.open()
        for stream in streams:
            assert (await collect(stream))[-1].finish_reason is FinishReason.LENGTH


async def test_a_failing_step_fails_every_request_once_and_kills_the_engine(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = Gate()
    async with Engine(gate, max_num_seqs=1) as engine:
        first = engine.client.generate(request=make_request("first", max_tokens=9))
        await gate.until_entered()
        second = engine.client.generate(request=make_request("second"))
        engine.executor.fail_with = RuntimeError("out of luck")
        with caplog.at_level(logging.ERROR):
            gate.open()
            results = [await collect(first), await collect(second)]
        for outputs in results:
            assert outputs[-1].finish_reason is FinishReason.ERROR
            assert "out of luck" in (outputs[-1].error or "")
        assert "first[" in caplog.text
        assert "blocks=" in caplog.text
        assert not engine.client.is_alive()
        with pytest.raises(EngineDeadError, match="out of luck"):
            engine.client.generate(request=make_request("third"))


async def test_a_failing_step_loses_no_terminal_output() -> None:
    config = make_config()
    executor = make_executor(config)
    executor.fail_with = RuntimeError("out of luck")
    group = make_group(config, executor)
    outputs: list[TokenOutput] = []
    for request_id in "ab":
        group.submit(make_request(request_id))
    group.abort("b")
    group.start(outputs.extend)
    assert await asyncio.to_thread(group.join, timeout_s=TIMEOUT_S)
    reasons = {o.request_id: o.finish_reason for o in outputs}
    assert len(outputs) == 2
    assert reasons == {"a": FinishReason.ERROR, "b": FinishReason.ABORT}


async def test_close_drains_running_requests() -> None:
    gate = Gate()
    async with Engine(gate) as engine:
        stream = engine.client.generate(request=make_request("a"))
        await gate.until_entered()
        closing = asyncio.ensure_future(engine.client.close(drain_timeout_s=TIMEOUT_S))
        await asyncio.sleep(0)
        with pytest.raises(CapacityError, match="shutting down"):
            engine.client.generate(request=make_request("b"))
        gate.open()
        outputs = await collect(stream)
        await closing
    assert outputs[-1].finish_reason is FinishReason.LENGTH


async def test_close_aborts_what_the_drain_leaves_over() -> None:
    gate = Gate()
    async with Engine(gate, max_num_seqs=1) as engine:
        streams = [engine.client.generate(request=make_request(f"r{i}")) for i in range(3)]
        await gate.until_entered()
        closing = asyncio.ensure_future(engine.client.close(drain_timeout_s=10.0))
        await asyncio.sleep(0)
        engine.clock.advance(11.0)
        gate.open()
        results = [await collect(stream) for stream in streams]
        await closing
    assert [r[-1].finish_reason for r in results] == [FinishReason.ABORT] * 3
    load = engine.client.load()
    assert load.num_free_blocks == load.num_total_blocks


async def test_a_loop_without_progress_is_not_alive() -> None:
    gate = Gate()
    async with Engine(gate) as engine:
        stream = engine.client.generate(request=make_request("a"))
        await gate.until_entered()
        assert engine.client.is_alive()
        engine.clock.advance(1000.0)
        assert not engine.client.is_alive()
        gate.open()
        await collect(stream)
        assert engine.client.is_alive()


async def test_a_cancelled_reader_aborts_its_request() -> None:
    gate = Gate()
    async with Engine(gate) as engine:
        stream = engine.client.generate(request=make_request("a", max_tokens=50))
        reader = asyncio.ensure_future(collect(stream))
        await gate.until_entered()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        gate.open()
        await collect(engine.client.generate(request=make_request("b")))
        assert engine.client.load().num_free_blocks == engine.config.num_kv_blocks
    assert [i.request_id for i in engine.executor.plans[1].scheduled] == ["b"]


async def test_a_forgotten_stream_aborts_its_request() -> None:
    gate = Gate()
    async with Engine(gate) as engine:
        stream = engine.client.generate(request=make_request("a", max_tokens=50))
        await gate.until_entered()
        del stream
        gc.collect()
        gate.open()
        await collect(engine.client.generate(request=make_request("b")))
    assert [i.request_id for i in engine.executor.plans[1].scheduled] == ["b"]


async def test_an_id_in_use_is_refused() -> None:
    gate = Gate()
    async with Engine(gate) as engine:
        stream = engine.client.generate(request=make_request("a"))
        with pytest.raises(RequestError, match="already in use"):
            engine.client.generate(request=make_request("a"))
        gate.open()
        await collect(stream)
        await collect(engine.client.generate(request=make_request("a")))


def test_a_client_may_move_to_another_event_loop() -> None:
    config = make_config()
    client = InProcClient(make_group(config, make_executor(config)))
    client.start()

    async def ask(request_id: str) -> list[int]:
        outputs = await collect(client.generate(request=make_request(request_id)))
        return [i for output in outputs for i in output.token_ids]

    async def leave_early() -> None:
        await anext(client.generate(request=make_request("left", max_tokens=60)))

    assert asyncio.run(ask("a")) == scripted_output([5, 6, 7], 4)
    asyncio.run(leave_early())
    assert asyncio.run(ask("a")) == scripted_output([5, 6, 7], 4)
    asyncio.run(client.close(drain_timeout_s=TIMEOUT_S))


async def test_a_steps_outputs_cross_threads_together() -> None:
    config = make_config()
    group = make_group(config, make_executor(config))
    batches: list[list[TokenOutput]] = []
    for idx in range(4):
        group.submit(make_request(f"r{idx}", [5 + idx], max_tokens=3))
    group.start(batches.append)
    group.begin_close(drain_timeout_s=TIMEOUT_S)
    assert await asyncio.to_thread(group.join, timeout_s=TIMEOUT_S)
    assert [len(batch) for batch in batches] == [4, 4, 4]


def test_inbox_and_terminal_outputs_balance_whatever_happens() -> None:
    config = make_config(max_num_seqs=2)
    executor = make_executor(config)
    group = make_group(config, executor)
    for idx in range(5):
        group.submit(make_request(f"r{idx}"))
    group.submit(make_request("r0"))
    group.abort("r3")
    ended = [o for _ in range(20) for o in group.step() if o.finish_reason is not None]
    reasons = sorted((o.request_id, str(o.finish_reason)) for o in ended)
    assert reasons == [
        ("r0", "error"),
        ("r0", "length"),
        ("r1", "length"),
        ("r2", "length"),
        ("r3", "abort"),
        ("r4", "length"),
    ]
