"""Worker metrics: what a status shows, and that nobody is asked at a scrape."""

from __future__ import annotations

import asyncio

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from tests.multiproc.cluster_harness import DEADLINE_S, running_cluster
from xdeepserve.launch.cluster_metrics import ClusterCollector, StageCollector
from xdeepserve.launch.placement import Placement
from xdeepserve.launch.plan import WorkerSpec
from xdeepserve.launch.process_identity import ProcessIdentity
from xdeepserve.launch.supervisor.messages import (
    ExpertHeat,
    Member,
    Membership,
    Status,
    WorkerState,
)
from xdeepserve.messages import Heartbeat
from xdeepserve.testing.fake_clock import FakeClock
from xdeepserve.transformerless.stage_times import Stage, StageTimes

GROUP = Member(
    spec=WorkerSpec(name="dp0", role="attention", rank=0),
    state=WorkerState.BUSY,
    incarnation=2,
    num_restarts=1,
    socket="dp0.sock",
)
EXPERT = Member(
    spec=WorkerSpec(name="expert1", role="expert", rank=1),
    state=WorkerState.FROZEN,
    incarnation=1,
    num_restarts=0,
    socket="expert1.sock",
)
STATUS = Status(
    membership=Membership(
        epoch=12,
        run_id="ab" * 4,
        counts={"attention": 1, "expert": 2},
        members=(GROUP, EXPERT),
        placement=Placement(epoch=3, ffn=(), expert=(0, 1), table=[[0, 1]]),
    ),
    supervisor=ProcessIdentity(41, 7),
    heartbeats={
        "dp0": Heartbeat(progress=3, load={"running": 2}, stage_s={"attention": 1.5, "wait": 4}),
        "expert1": Heartbeat(progress=9, load={"rows": 640, "new": 1}, stage_s={"expert": 2.5}),
        "gone": Heartbeat(progress=1, load={"rows": 1}),
    },
    num_dropped=2,
)


def scrape(collector: Collector) -> set[str]:
    """The sample lines, without the prefix."""
    registry = CollectorRegistry()
    registry.register(collector)
    lines = generate_latest(registry).decode().splitlines()
    assert all(line.startswith(("# ", "xdeepserve:")) for line in lines)
    return {line.removeprefix("xdeepserve:") for line in lines if not line.startswith("# ")}


def test_a_status() -> None:
    clock = FakeClock()
    collector = ClusterCollector(clock)
    assert scrape(collector) == set()
    collector.take(STATUS)
    clock.advance(2.5)
    assert scrape(collector) == {
        "cluster_status_age_seconds 2.5",
        "membership_epoch 12.0",
        "routing_epoch 3.0",
        "workers_dropped_total 2.0",
        'workers_wanted{role="attention"} 1.0',
        'workers_wanted{role="expert"} 2.0',
        'worker_up{role="attention",worker="dp0"} 1.0',
        'worker_up{role="expert",worker="expert1"} 0.0',
        'worker_restarts_total{role="attention",worker="dp0"} 1.0',
        'worker_restarts_total{role="expert",worker="expert1"} 0.0',
        'worker_requests_running{role="attention",worker="dp0"} 2.0',
        'worker_rows_total{role="expert",worker="expert1"} 640.0',
        'worker_stage_seconds_total{role="attention",stage="attention",worker="dp0"} 1.5',
        'worker_stage_seconds_total{role="attention",stage="wait",worker="dp0"} 4.0',
        'worker_stage_seconds_total{role="expert",stage="expert",worker="expert1"} 2.5',
    }


def test_the_heat_of_experts() -> None:
    collector = ClusterCollector(FakeClock())
    heat = ExpertHeat(
        num_tokens=100,
        peak_over_mean=1.25,
        hottest=(3, 7),
        hottest_share=0.5,
        num_migrations=2,
        num_moves=9,
        is_migrating=False,
        placement_epoch=3,
        rank_ratios={0: 1.25, 3: 0.75},
    )
    collector.take(msgspec.structs.replace(STATUS, expert_heat=heat))
    assert {
        "expert_load_peak_over_mean 1.25",
        "expert_moves_total 9.0",
        'expert_rank_load_ratio{worker="expert0"} 1.25',
        'expert_rank_load_ratio{worker="expert3"} 0.75',
    } <= scrape(collector)


def with_group(incarnation: int, load: dict[str, float] | None) -> Status:
    """STATUS with another life of dp0; load None = it has sent no heartbeat."""
    group = msgspec.structs.replace(GROUP, incarnation=incarnation)
    membership = msgspec.structs.replace(STATUS.membership, members=(group, EXPERT))
    beats = {} if load is None else {"dp0": Heartbeat(progress=1, load=load)}
    return msgspec.structs.replace(STATUS, membership=membership, heartbeats=beats)


def test_failovers_and_fallbacks_grow_over_all_lives_of_a_group() -> None:
    collector = ClusterCollector(FakeClock())
    shown = []
    for status in (
        with_group(1, {"failovers": 3, "fallbacks": 1}),
        with_group(1, {"failovers": 4, "fallbacks": 1}),
        with_group(1, None),
        with_group(2, {"failovers": 0, "fallbacks": 0}),
        with_group(2, {"failovers": 2, "fallbacks": 5}),
    ):
        collector.take(status)
        samples = [line.split() for line in scrape(collector)]
        shown.append(
            {
                name.partition("{")[0]: float(value)
                for name, value in samples
                if "failovers" in name or "fallbacks" in name
            }
        )
    failovers = [families["worker_failovers_total"] for families in shown]
    fallbacks = [families["worker_fallbacks_total"] for families in shown]
    assert failovers == [3, 4, 4, 4, 6]
    assert fallbacks == [1, 1, 1, 1, 6]


def test_a_colocated_group() -> None:
    times = StageTimes()
    collector = StageCollector(times)
    assert scrape(collector) == set()
    with times.measure(Stage.ATTENTION):
        pass
    seconds = times.seconds()[Stage.ATTENTION]
    labels = 'role="attention",stage="attention",worker="dp0"'
    (line,) = scrape(collector)
    name, value = line.split()
    assert name == f"worker_stage_seconds_total{{{labels}}}"
    assert float(value) == seconds


async def test_a_cluster_is_followed() -> None:
    async with running_cluster(attention=1, expert=1) as running:
        collector = ClusterCollector()
        following = asyncio.create_task(collector.follow(running.cluster))
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not (lines := scrape(collector)):
                    assert not following.done()
                    await asyncio.sleep(0.01)
        finally:
            following.cancel()
    assert 'worker_up{role="attention",worker="dp0"} 1.0' in lines
    assert 'worker_up{role="expert",worker="expert0"} 1.0' in lines
