"""A client that stays connected and does not read; one that reads and waits for the engine."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.maas.asgi import MODEL, Call, events, open_app
from tests.unit.maas.replay_engine import ReplayEngine, steps_of
from xdeepserve.maas import sse

PATH = "/v1/completions"
TIMEOUT_S = 30.0


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_client_that_does_not_read_is_gone(
    monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    monkeypatch.setattr(sse, "SEND_TIMEOUT_S", 0.04)
    engine = ReplayEngine(steps_of("abc"))
    running = Call(open_app(engine), PATH, {"model": MODEL, "prompt": "x", "stream": is_stream})
    running.is_reading.clear()
    async with asyncio.timeout(TIMEOUT_S):
        await running.task
    assert len([m for m in running.sent if m.get("body")]) == 1
    assert len(engine.closed) == 1


async def test_waiting_for_the_engine_is_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "SEND_TIMEOUT_S", 0.04)
    engine = ReplayEngine(steps_of("abc"))
    engine.gate.clear()
    running = Call(open_app(engine), PATH, {"model": MODEL, "prompt": "x", "stream": True})
    await asyncio.sleep(0.2)
    assert not running.task.done()
    engine.gate.set()
    async with asyncio.timeout(TIMEOUT_S):
        await running.task
    assert events(running.body)[-1] == "[DONE]"
