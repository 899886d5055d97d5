"""Many concurrent streams of mixed lengths, a third cancelled at random, round after round.

Every survivor's text equals its solo run, the free KV blocks return to the starting count, and
memory stays flat from round to round. The default run takes a small load, `-m soak` 200 streams.
"""

from __future__ import annotations

import asyncio
import os
import random
import urllib.request
from typing import NamedTuple

import pytest
from openai import AsyncOpenAI

from tests.e2e.conftest import MODEL
from xdeepserve.launch.server_process import ServerProcess

pytestmark = [pytest.mark.weights, pytest.mark.slow]


class Load(NamedTuple):
    """How much is asked of the server at once.

    Attributes:
        num_streams: several times max_num_seqs, so that most of them have to queue.
    """

    num_streams: int
    num_rounds: int
    max_num_seqs: int

    def __str__(self) -> str:
        return f"{self.num_streams} streams, {self.num_rounds} rounds"


SHORT = Load(num_streams=48, num_rounds=2, max_num_seqs=12)
LONG = Load(num_streams=200, num_rounds=3, max_num_seqs=48)


def _jobs(count: int) -> list[dict[str, object]]:
    rng = random.Random(11)
    words = [
        "river",
        "stone",
        "cloud",
        "winter",
        "engine",
        "garden",
        "paper",
        "silver",
        "music",
        "harbour",
    ]
    return [
        {
            "model": MODEL,
            "prompt": " ".join(rng.choices(words, k=rng.randint(3, 50))),
            "max_tokens": rng.randint(4, 16),
            "temperature": rng.choice([0.0, 0.8]),
            "seed": index,
            "extra_body": {"ignore_eos": True},
        }
        for index in range(count)
    ]


async def _text(client: AsyncOpenAI, job: dict[str, object], *, cancel_after: int = 0) -> str:
    stream = await client.completions.create(stream=True, **job)  # type: ignore[call-overload]
    parts: list[str] = []
    async with stream:
        async for chunk in stream:
            parts.append(chunk.choices[0].text)
            if cancel_after and len(parts) >= cancel_after:
                break
    return "".join(parts)


async def _round(client: AsyncOpenAI, solo: list[str], rng: random.Random) -> int:
    """Run all streams at once; returns how many were cancelled."""
    jobs = _jobs(len(solo))
    cancels = [rng.randint(1, 6) if rng.random() < 1 / 3 else 0 for _ in jobs]
    texts = await asyncio.gather(
        *(
            _text(client, job, cancel_after=cancel)
            for job, cancel in zip(jobs, cancels, strict=True)
        )
    )
    for text, expected, cancel in zip(texts, solo, cancels, strict=True):
        if cancel:
            assert expected.startswith(text)
        else:
            assert text == expected
    return sum(1 for cancel in cancels if cancel)


def _resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _metric(server: ServerProcess, name: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


async def _idle(server: ServerProcess) -> None:
    for _ in range(500):
        running = await asyncio.to_thread(_metric, server, "xdeepserve:num_requests_running")
        waiting = await asyncio.to_thread(_metric, server, "xdeepserve:num_requests_waiting")
        if running == 0 and waiting == 0:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the server never became idle")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("load", [SHORT, pytest.param(LONG, marks=pytest.mark.soak)], ids=str)
async def test_a_third_of_the_streams_is_cancelled(load: Load) -> None:
    arguments = ("--dtype", "int8", "--num-kv-blocks", "1200")
    with ServerProcess(MODEL, *arguments, "--max-num-seqs", str(load.max_num_seqs)) as server:
        async with AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300
        ) as client:
            solo = [await _text(client, job) for job in _jobs(load.num_streams)]
            await _idle(server)
            usage_before = _metric(server, "xdeepserve:kv_cache_usage_perc")
            rng = random.Random(5)
            resident = []
            for _ in range(load.num_rounds):
                assert await _round(client, solo, rng) > load.num_streams // 5
                await _idle(server)
                assert _metric(server, "xdeepserve:kv_cache_usage_perc") == usage_before == 0
                resident.append(_resident_bytes(server.pid))
        assert resident[-1] - resident[0] < 48 << 20, resident
