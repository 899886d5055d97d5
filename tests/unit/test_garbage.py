"""Garbage is collected when nobody waits for it: not while a group steps, once when it is idle."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.flowserve.builders import make_config, make_executor, make_group, make_request
from tests.unit.maas.asgi import open_app
from tests.unit.maas.replay_engine import ReplayEngine
from xdeepserve import garbage
from xdeepserve.config import GatewayConfig
from xdeepserve.flowserve import dp_group
from xdeepserve.flowserve.engine_client import InProcClient
from xdeepserve.maas.server import COLLECT_AFTER_TICKS, make_server

TIMEOUT_S = 30.0


class Node:
    """Part of a cycle."""

    def __init__(self) -> None:
        self.other = self


@pytest.fixture
def settled() -> Iterator[None]:
    thresholds = gc.get_threshold()
    garbage.settle()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.fixture
def full_collections() -> Iterator[list[str]]:
    """Grows by an entry with each full collection."""
    found: list[str] = []

    def note(phase: str, info: dict[str, Any]) -> None:
        if phase == "start" and info["generation"] == 2:
            found.append(phase)

    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)


@pytest.mark.usefixtures("settled")
def test_cycles_of_later_are_collected_and_what_was_there_is_not_looked_at() -> None:
    assert gc.get_freeze_count() > 10_000
    assert len(gc.get_objects()) < 1000
    reference = weakref.ref(Node())
    assert reference() is not None
    garbage.collect_idle()
    assert reference() is None


def test_a_process_that_has_not_settled_is_left_alone(full_collections: list[str]) -> None:
    garbage.collect_idle()
    assert not full_collections


@pytest.mark.usefixtures("settled")
async def test_a_group_collects_once_it_is_idle_and_not_while_it_steps(
    monkeypatch: pytest.MonkeyPatch, full_collections: list[str]
) -> None:
    monkeypatch.setattr(dp_group, "IDLE_WAKE_S", 0.2)
    config = make_config(max_num_seqs=4, num_kv_blocks=128)
    client = InProcClient(make_group(config, make_executor(config)))
    client.start()
    full_collections.clear()
    kept: list[Node] = []
    for round_idx in range(40):
        streams = [
            client.generate(request=make_request(f"{round_idx}-{idx}", max_tokens=20))
            for idx in range(4)
        ]
        for stream in streams:
            # Enough containers for a full collection at the interpreter's own thresholds.
            kept += [Node() async for _ in stream for _ in range(100)]
    assert len(kept) > 100_000
    assert not full_collections
    async with asyncio.timeout(TIMEOUT_S):
        while not full_collections:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.5)
    assert len(full_collections) == 1
    await client.close(drain_timeout_s=0.0)


@pytest.mark.usefixtures("settled")
async def test_a_gateway_collects_once_in_an_idle_spell(full_collections: list[str]) -> None:
    app = open_app(ReplayEngine())
    server = make_server(app, GatewayConfig(port=0), on_ready=lambda: None)
    full_collections.clear()
    running = app.state.gateway._running
    for _ in range(2):
        running.add("a generation")
        for _ in range(3 * COLLECT_AFTER_TICKS):
            await server.on_tick(1)
        assert not full_collections
        running.clear()
        for _ in range(3 * COLLECT_AFTER_TICKS):
            await server.on_tick(1)
        assert len(full_collections) == 1
        full_collections.clear()
