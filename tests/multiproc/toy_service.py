"""A toy model served by processes of their own, whose texts must be those of one engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from tests.multiproc.exactness import (
    LoadRun,
    Serving,
    Topology,
    check_equal,
    colocated,
    install_toy,
    mixed_load,
    serving,
)
from xdeepserve import envs
from xdeepserve.launch.run_dir import RunDirectory
from xdeepserve.testing.toy_models import toy_checkpoint

MODEL, DTYPE, MAX_TOKENS = "qwen3_moe", "bf16", 24


@asynccontextmanager
async def toy_service(home: Path, topology: Topology) -> AsyncIterator[Serving]:
    install_toy(home, MODEL, toy_checkpoint(MODEL))
    with envs.HOME.override(str(home)):
        async with serving(MODEL, DTYPE, topology) as service:
            yield service


async def check_texts(service: Serving, seed: int) -> None:
    """One mixed load gives what one engine gives."""
    requests = mixed_load(service.router.info.vocab_size, seed, max_tokens=MAX_TOKENS)
    expected = colocated(MODEL, DTYPE, seed, MAX_TOKENS)
    check_equal(requests, await LoadRun(service.router, requests).run(), expected)


async def check_texts_during(
    service: Serving, disturb: Callable[[RunDirectory], Awaitable[None]]
) -> None:
    """Loads before, after, and one upon the other for as long as `disturb` takes."""
    await check_texts(service, 0)
    disturbing = asyncio.ensure_future(disturb(service.run))
    while not disturbing.done():
        await check_texts(service, 1)
    await disturbing
    await check_texts(service, 2)
