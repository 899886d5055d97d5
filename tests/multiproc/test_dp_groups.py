"""Two DP groups in processes of their own behind a router: killed, frozen, drained, restarted.

Under every fault, every stream must be exactly what an undisturbed engine gives.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests import law1_harness as law1
from tests.multiproc.dp_worker import TOY, make_group
from tests.toys import toy_model
from xdeepserve.flowserve.remote_engine import LinkTimes, RemoteEngine
from xdeepserve.flowserve.router import RouterEngine
from xdeepserve.messages import GenerateRequest, TokenOutput

pytestmark = pytest.mark.slow

TIMEOUT_S = 60.0
STEP_S = 0.004
NUM_STREAMS = 16
MAX_TOKENS = 40
NAMES = ("dp0", "dp1")
ROOT = Path(__file__).parents[2]


@cache
def requests() -> list[GenerateRequest]:
    """Every way of sampling, none ending early, so that a fault always hits running streams."""
    vocab_size = toy_model(*TOY).spec.vocab_size
    mixed = law1.mixed_requests(vocab_size, NUM_STREAMS, max_tokens=MAX_TOKENS)
    return [
        msgspec.structs.replace(item, params=msgspec.structs.replace(item.params, ignore_eos=True))
        for item in mixed
    ]


@cache
def undisturbed() -> dict[str, Any]:
    return law1.contents(law1.generate(make_group(), requests()))


class Cluster:
    """Worker processes and the router over them."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.engines: dict[str, RemoteEngine] = {}
        self.router: RouterEngine
        self.num_tokens = 0
        self.longest_gap_s = 0.0

    def start_process(self, name: str) -> None:
        command = [sys.executable, "-m", "tests.multiproc.dp_worker"]
        arguments = [str(self.run_dir / f"{name}.sock"), "--step-s", str(STEP_S)]
        self.processes[name] = subprocess.Popen([*command, *arguments], cwd=ROOT)

    async def start(self) -> None:
        for name in NAMES:
            self.start_process(name)
        for name in NAMES:
            self.engines[name] = await self.connect(name)
        self.router = RouterEngine(self.engines["dp0"].info)
        for name, engine in self.engines.items():
            self.router.add(name, engine)

    async def connect(self, name: str) -> RemoteEngine:
        path = self.run_dir / f"{name}.sock"
        times = LinkTimes(silence_s=1.0)
        return await RemoteEngine.connect(path, timeout_s=TIMEOUT_S, times=times)

    def kill(self, name: str, signum: int) -> None:
        os.kill(self.processes[name].pid, signum)

    async def stop(self) -> None:
        await self.router.close(drain_timeout_s=0.0)
        for process in self.processes.values():
            process.kill()
            process.wait(TIMEOUT_S)

    async def read(self, request: GenerateRequest) -> law1.Generation:
        got = law1.Generation([], [])
        last: TokenOutput | None = None
        async for output in self.router.generate(request=request):
            assert output.request_id == request.request_id
            self.num_tokens += len(output.token_ids)
            got.token_ids += output.token_ids
            got.logprobs += output.logprobs or []
            got.finish_reason, got.usage = output.finish_reason, output.usage
            last = output
        assert last is not None
        assert last.usage.num_prompt_tokens == len(request.prompt_token_ids)
        assert last.usage.num_output_tokens == len(got.token_ids)
        return got

    async def run(self, *faults: Callable[[], Any], every: int = 150) -> dict[str, Any]:
        """All requests at once; a fault after each `every` tokens passed to clients."""
        start = self.num_tokens
        reading = [asyncio.create_task(self.read(request)) for request in requests()]
        async with asyncio.timeout(TIMEOUT_S):
            for idx, fault in enumerate(faults, 1):
                while self.num_tokens - start < idx * every:
                    await asyncio.sleep(0)
                if asyncio.iscoroutine(pending := fault()):
                    await pending
            results = await asyncio.gather(*reading)
        named = zip(requests(), results, strict=True)
        return {request.request_id: result.content for request, result in named}

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                await asyncio.sleep(0.01)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    made = Cluster(tmp_path)
    await made.start()
    yield made
    await made.stop()


def num_lost(cluster: Cluster) -> int:
    return sum(status.num_failures for status in cluster.router.members())


async def test_both_groups_work_and_nothing_differs_from_one_engine(cluster: Cluster) -> None:
    assert await cluster.run() == undisturbed()
    loads = [engine.load() for engine in cluster.engines.values()]
    assert all(load.num_generated_tokens > 0 for load in loads)
    assert sum(load.num_generated_tokens for load in loads) == NUM_STREAMS * MAX_TOKENS
    assert cluster.router.load().num_running == 0


async def test_a_killed_group_is_replayed_on_the_other_and_comes_back(cluster: Cluster) -> None:
    result = await cluster.run(lambda: cluster.kill("dp0", signal.SIGKILL))
    assert result == undisturbed()
    assert num_lost(cluster) > 0, "nothing ran on the killed group; nothing was checked"
    cluster.processes["dp0"].wait(TIMEOUT_S)
    cluster.start_process("dp0")
    await cluster.until(lambda: all(s.is_alive for s in cluster.router.members()))
    result = await cluster.run(lambda: cluster.kill("dp1", signal.SIGKILL))
    assert result == undisturbed()


async def test_the_only_group_left_is_killed_and_restarted_under_load(cluster: Cluster) -> None:
    await cluster.router.remove("dp1", drain_timeout_s=0.0)

    def restart() -> None:
        cluster.kill("dp0", signal.SIGKILL)
        cluster.processes["dp0"].wait(TIMEOUT_S)
        cluster.start_process("dp0")

    assert await cluster.run(restart) == undisturbed()
    assert num_lost(cluster) == NUM_STREAMS


async def test_a_frozen_group_is_given_up_and_its_late_outputs_are_dropped(
    cluster: Cluster,
) -> None:
    frozen = cluster.engines["dp0"]

    async def freeze_and_thaw() -> None:
        cluster.kill("dp0", signal.SIGSTOP)
        await cluster.until(lambda: not frozen.is_alive())
        cluster.kill("dp0", signal.SIGCONT)

    assert await cluster.run(freeze_and_thaw) == undisturbed()
    assert num_lost(cluster) > 0
    await cluster.until(frozen.is_alive)
    await cluster.until(lambda: frozen.load().num_running == 0)
    assert frozen.load().num_free_blocks == frozen.load().num_total_blocks
    assert await cluster.run() == undisturbed()


async def test_a_group_is_drained_and_ended_under_load(cluster: Cluster) -> None:
    async def scale_down() -> None:
        await cluster.router.drain("dp0", timeout_s=0.0)
        cluster.kill("dp0", signal.SIGTERM)
        await cluster.router.remove("dp0", drain_timeout_s=0.0)

    assert await cluster.run(scale_down) == undisturbed()
    assert [status.name for status in cluster.router.members()] == ["dp1"]
    assert num_lost(cluster) == 0
    assert await asyncio.to_thread(cluster.processes["dp0"].wait, TIMEOUT_S) == 0
    assert not (cluster.run_dir / "dp0.sock").exists()


async def test_a_group_joins_under_load(cluster: Cluster) -> None:
    async def scale_up() -> None:
        cluster.start_process("dp2")
        cluster.router.add("dp2", await cluster.connect("dp2"))

    assert await cluster.run(scale_up) == undisturbed()
    assert await cluster.run() == undisturbed()
    assert all(status.load.num_generated_tokens > 0 for status in cluster.router.members())
