"""Background: a task that fails is logged, told, and ends what is guarded."""

from __future__ import annotations

import asyncio
import logging

import pytest

from xdeepserve.errors import EngineDeadError
from xdeepserve.launch.background import Background


async def fail() -> None:
    raise RuntimeError("out of luck")


async def test_a_failure_is_logged_and_ends_what_is_guarded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    background = Background()
    forever = asyncio.get_running_loop().create_future()
    background.start(fail(), name="hoping")
    reason = "hoping failed: RuntimeError: out of luck"
    with pytest.raises(EngineDeadError, match=reason):
        await background.guard(forever)
    assert forever.cancelled()
    assert background.failure == reason
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (logging.ERROR, "hoping failed")
    assert record.exc_info is not None
    with pytest.raises(EngineDeadError, match=reason):
        await background.guard(asyncio.sleep(0))


async def test_what_is_guarded_may_end_in_its_own_time() -> None:
    background = Background()
    stopped, steps = asyncio.Event(), []

    async def serve() -> None:
        await stopped.wait()
        await asyncio.sleep(0)
        steps.append("drained")

    background.start(fail(), name="hoping")
    with pytest.raises(EngineDeadError):
        await background.guard(serve(), stop=stopped.set)
    assert steps == ["drained"]


async def test_without_a_failure_the_result_counts() -> None:
    background = Background()
    task = background.start(asyncio.sleep(0), name="a task that ends")
    await task
    assert await background.guard(asyncio.sleep(0, result=7)) == 7
    with pytest.raises(ValueError, match="no"):
        await background.guard(refuse())
    assert background.failure is None


async def refuse() -> int:
    raise ValueError("no")


async def test_closing_is_no_failure() -> None:
    background = Background()
    task = background.start(asyncio.sleep(3600), name="waiting")
    await background.close()
    await background.close()
    assert task.cancelled()
    assert background.failure is None
