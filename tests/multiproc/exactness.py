"""Law 1 over processes: a service taken apart must give what one colocated engine gives.

    mixed_load(seed) --> router of a running cluster --> outputs  ==  colocated outputs
                         (DP groups, FFN and expert workers in processes of their own)

Models are named as in the store; toys are written into a home folder of their own.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import msgspec

from tests import law1_harness as law1
from tests.multiproc.cluster_harness import SUPERVISION, run_folder
from tests.toys import write_toy
from xdeepserve.config import EngineConfig, ModelConfig
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.flowserve.router import RouterEngine
from xdeepserve.launch.background import Background
from xdeepserve.launch.cluster import Cluster
from xdeepserve.launch.compose import LoadedModel, load_named, shape_of
from xdeepserve.launch.deployment import (
    AttentionRoleSpec,
    Deployment,
    ExpertRoleSpec,
    RoleSpec,
    RolesSpec,
)
from xdeepserve.launch.plan import resolve
from xdeepserve.launch.router_members import RouterMembers
from xdeepserve.launch.service import ServiceConfig
from xdeepserve.launch.worker.bodies import bodies_for
from xdeepserve.messages import GenerateRequest
from xdeepserve.testing.toy_models import ToyCheckpoint
from xdeepserve.transformerless.partition import partition
from xdeepserve.xccl import list_segments

DEADLINE_S = 120.0
POLL_S = 0.02

LIMITS = EngineConfig(max_num_seqs=8, max_num_batched_tokens=64, block_size=8, num_kv_blocks=48)
"""Small: long prompts are chunked, requests queue, and one group alone must preempt some."""

NUM_REQUESTS, NUM_AT_ONCE = 16, 8
"""Request n + 8 of a load starts when request n has answered."""

ABORTED_AFTER = {2: 1, 9: 4}
"""Requests of a load whose client asks for their end, and after how many tokens."""

LEFT_AFTER = {5: 0, 12: 2}
"""Requests whose client is gone after so many tokens; 0 = while its prompt waits."""

REPEATING = (10, 11, 13, 14)
"""Requests whose prompt begins with that of the request that lets them start."""

CANCELLED = frozenset(f"r{idx}" for idx in (*ABORTED_AFTER, *LEFT_AFTER))


@dataclass(frozen=True, slots=True)
class Topology:
    """Workers by role, microbatches of a step, who computes experts, and where drafts come from."""

    attention: int
    ffn: int = 0
    expert: int = 0
    replicas: int = 0
    num_microbatches: int = 1
    share_experts: bool = False
    speculation: str = "off"

    def __str__(self) -> str:
        counts = (("A", self.attention), ("F", self.ffn), ("E", self.expert), ("R", self.replicas))
        roles = "".join(f"{count}{letter}" for letter, count in counts if count)
        drafts = "" if self.speculation == "off" else f"-{self.speculation}"
        shared = "-share" if self.share_experts else ""
        return f"{roles}-{self.num_microbatches}mb{shared}{drafts}"

    def roles(self) -> RolesSpec:
        """As a deployment says it."""
        return RolesSpec(
            attention=AttentionRoleSpec(count=self.attention),
            ffn=RoleSpec(count=self.ffn),
            expert=ExpertRoleSpec(count=self.expert, replicas=self.replicas),
        )


def install_toy(home: Path, name: str, checkpoint: ToyCheckpoint) -> None:
    """Write a toy where the store of `home` finds it by name."""
    folder = home / "models" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_toy(folder, checkpoint)


# -- the load --------------------------------------------------------------------------------------


def mixed_load(vocab_size: int, seed: int, *, max_tokens: int) -> list[GenerateRequest]:
    """16 requests; those that will be cancelled would last longer."""
    requests = law1.mixed_requests(vocab_size, NUM_REQUESTS, max_tokens=max_tokens, seed=seed)
    for idx in REPEATING:
        prompt = requests[idx - NUM_AT_ONCE].prompt_token_ids + requests[idx].prompt_token_ids
        requests[idx] = msgspec.structs.replace(requests[idx], prompt_token_ids=prompt)
    for idx in (*ABORTED_AFTER, *LEFT_AFTER):
        params = msgspec.structs.replace(
            requests[idx].params, max_tokens=4 * max_tokens, ignore_eos=True
        )
        requests[idx] = msgspec.structs.replace(requests[idx], params=params)
    return requests


@cache
def colocated(model: str, dtype: str, seed: int, max_tokens: int) -> dict[str, law1.Generation]:
    """What one engine in this process gives, nothing cancelled."""
    loaded = load_named(model, ModelConfig(dtype=dtype))
    group = build_dp_group(model=loaded.model, model_name=model, config=law1.config())
    requests = mixed_load(loaded.model.spec.vocab_size, seed, max_tokens=max_tokens)
    return law1.generate(group, requests)


class LoadRun:
    """One load through an engine: half of it at once, the others whenever one has answered."""

    def __init__(self, engine: RouterEngine, requests: Sequence[GenerateRequest]) -> None:
        self._engine = engine
        self._requests = requests
        self._answered = [asyncio.Event() for _ in requests]

    async def run(self) -> dict[str, law1.Generation]:
        """What each request got."""
        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
            reading = [tasks.create_task(self._read(idx)) for idx in range(len(self._requests))]
        named = zip(self._requests, reading, strict=True)
        return {request.request_id: task.result() for request, task in named}

    async def _read(self, idx: int) -> law1.Generation:
        if idx >= NUM_AT_ONCE:
            await self._answered[idx - NUM_AT_ONCE].wait()
        got = law1.Generation([], [])
        stream = self._engine.generate(request=self._requests[idx])
        while not self._has_left(idx, got):
            output = await anext(stream, None)
            self._answered[idx].set()
            if output is None:
                return got
            got.token_ids += output.token_ids
            got.logprobs += output.logprobs or []
            got.finish_reason, got.usage = output.finish_reason, output.usage
            if len(got.token_ids) >= ABORTED_AFTER.get(idx, sys.maxsize):
                await self._engine.abort(request_id=output.request_id)
        await stream.aclose()
        self._answered[idx].set()
        return got

    def _has_left(self, idx: int, got: law1.Generation) -> bool:
        return len(got.token_ids) >= LEFT_AFTER.get(idx, sys.maxsize)


def check_equal(
    requests: Sequence[GenerateRequest],
    got: dict[str, law1.Generation],
    expected: dict[str, law1.Generation],
) -> None:
    """Survivors got all that they would have got alone; the cancelled ones a beginning of it."""
    for request in requests:
        mine, theirs = got[request.request_id], expected[request.request_id]
        if request.request_id not in CANCELLED:
            assert mine.content == theirs.content, request
            continue
        count = len(mine.token_ids)
        assert mine.token_ids == theirs.token_ids[:count], request
        assert mine.logprobs == theirs.logprobs[:count], request


# -- the service -----------------------------------------------------------------------------------


class Serving:
    """A running service that was taken apart."""

    def __init__(
        self,
        cluster: Cluster,
        router: RouterEngine,
        loaded: LoadedModel,
        *,
        share_experts: bool,
    ) -> None:
        self.router = router
        self.run = cluster.run
        self._cluster = cluster
        units, moe = partition(loaded.model), loaded.model.spec.moe
        num_moe_layers = sum(unit is not None for unit in units.experts)
        self._rows_per_token = {
            "ffn": sum(unit is not None for unit in units.ffn),
            # Of experts that are shared, the attention workers may have done the most.
            "expert": 0 if moe is None or share_experts else num_moe_layers * moe.gate.top_k,
        }

    async def check(
        self, requests: Sequence[GenerateRequest], expected: dict[str, law1.Generation]
    ) -> None:
        """Send a load and compare; afterwards nothing of it may be left."""
        rows_before = await self._rows()
        got = await LoadRun(self.router, requests).run()
        check_equal(requests, got, expected)
        async with asyncio.timeout(DEADLINE_S):
            while not self._is_idle():
                await asyncio.sleep(POLL_S)
            while not self._is_reported(await self._rows(), rows_before, num_computed(got)):
                await asyncio.sleep(POLL_S)
        members = (await self._cluster.status()).membership.members
        assert [member.num_restarts for member in members] == [0] * len(members)

    def _is_idle(self) -> bool:
        load = self.router.load()
        is_whole = load.num_free_blocks == load.num_total_blocks
        return is_whole and load.num_running + load.num_waiting == 0

    async def _rows(self) -> dict[str, list[int]]:
        """Rows that the workers of each module have computed, as they last reported."""
        status = await self._cluster.status()
        rows: dict[str, list[int]] = {"ffn": [], "expert": []}
        for member in status.membership.members:
            if member.spec.role in rows:
                heartbeat = status.heartbeats.get(member.name)
                rows[member.spec.role].append(heartbeat.load["rows"] if heartbeat else 0)
        return rows

    def _is_reported(
        self, rows: dict[str, list[int]], before: dict[str, list[int]], num_tokens: int
    ) -> bool:
        """Whether the workers have done all that a load takes, and each of them some of it."""
        return all(
            sum(rows[role]) - sum(before[role]) >= num_tokens * self._rows_per_token[role]
            and all(now > then for now, then in zip(rows[role], before[role], strict=True))
            for role in rows
            if rows[role]
        )


def num_computed(got: dict[str, law1.Generation]) -> int:
    """Tokens that the survivors of a load have cost at least."""
    usages = [got[request_id].usage for request_id in got if request_id not in CANCELLED]
    return sum(
        usage.num_prompt_tokens - usage.num_cached_tokens + usage.num_output_tokens - 1
        for usage in usages
        if usage is not None
    )


def make_service(loaded: LoadedModel, dtype: str, topology: Topology) -> ServiceConfig:
    """What `xds serve` makes of a model and the roles asked for.

    Raises:
        ConfigError: the model has no use for a role.
    """
    deployment = Deployment(
        model=loaded.name,
        precision=ModelConfig(dtype=dtype),
        roles=topology.roles(),
        limits=replace(
            LIMITS,
            num_microbatches=topology.num_microbatches,
            speculation=topology.speculation,
            share_experts=topology.share_experts,
        ),
        supervision=replace(SUPERVISION, start_timeout_s=60.0, busy_timeout_s=60.0),
    )
    shape = shape_of(loaded)
    plan = resolve(deployment, shape, usable_cores=os.sched_getaffinity(0))
    return ServiceConfig(
        model_path=str(loaded.path.resolve()),
        model_name=loaded.name,
        shape=shape,
        deployment=deployment,
        bodies=bodies_for(plan),
    )


@asynccontextmanager
async def serving(model: str, dtype: str, topology: Topology) -> AsyncIterator[Serving]:
    """A cluster whose workers are ready; afterwards nothing of it may be left."""
    loaded = load_named(model, ModelConfig(dtype=dtype))
    background = Background()
    members = RouterMembers(drain_timeout_s=1.0, background=background)
    with run_folder() as folder:
        service = make_service(loaded, dtype, topology)
        cluster = Cluster(service, members, background=background)
        run_id = cluster.run.run_id
        try:
            await cluster.start(timeout_s=DEADLINE_S)
            yield Serving(cluster, members.router, loaded, share_experts=topology.share_experts)
            await members.router.close(drain_timeout_s=0.0)
        finally:
            await cluster.stop(drain_timeout_s=1.0)
        assert list(folder.iterdir()) == []
        assert list_segments(run_id) == []
