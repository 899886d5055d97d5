"""Metrics of the workers, for the gateway's `/metrics`.

    supervisor --Status, every second--> ClusterCollector --at a scrape--> metric families

A scrape reads what is there and asks nobody, so it is as fast without a supervisor as with one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from xdeepserve.clock import SYSTEM_CLOCK, Clock
from xdeepserve.errors import XDeepServeError
from xdeepserve.launch.cluster import Cluster
from xdeepserve.launch.supervisor.messages import ExpertHeat, Membership, Status
from xdeepserve.maas.metrics import PREFIX
from xdeepserve.transformerless.stage_times import StageTimes

INTERVAL_S: Final = 1.0
"""Between two questions to the supervisor."""

WORKER: Final = ("worker", "role")

GAUGES: Final = {
    "running": ("worker_requests_running", "Requests that a DP group computes."),
    "waiting": ("worker_requests_waiting", "Requests that wait in a DP group."),
    "kv_usage": ("worker_kv_cache_usage", "Share of a DP group's KV blocks in use, 0 to 1."),
}
"""Number of a heartbeat's load -> name and text of its gauge."""

COUNTERS: Final = {
    "generated": ("worker_generation_tokens", "Tokens that a DP group generated."),
    "requests": ("worker_exchanges", "Exchanges that an FFN or expert worker answered."),
    "rows": ("worker_rows", "Rows that an FFN or expert worker computed."),
}
"""Number of a heartbeat's load -> name and text of its counter."""

Samples = Iterable[tuple[tuple[str, ...], float]]
"""Label values and value of each."""

logger = logging.getLogger(__name__)


class ClusterCollector(Collector):
    """What the gateway shows of its workers. Used on the gateway's event loop."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._status: Status | None = None
        self._taken_s = 0.0

    async def follow(self, cluster: Cluster) -> None:
        """Keep the status up to date, until cancelled."""
        while True:
            try:
                self.take(await cluster.status())
            except XDeepServeError as exc:
                logger.debug("no status of the workers: %s", exc.message)
            await asyncio.sleep(INTERVAL_S)

    def take(self, status: Status) -> None:
        """Show this status from now on."""
        self._status, self._taken_s = status, self._clock.monotonic()

    def collect(self) -> Iterator[Metric]:
        """The families of the latest status; none before the first."""
        if self._status is None:
            return
        age_s = self._clock.monotonic() - self._taken_s
        yield _gauge("cluster_status_age_seconds", "Age of what is known of the workers.", age_s)
        yield from _membership_families(self._status.membership)
        yield from _heartbeat_families(self._status)
        if (heat := self._status.expert_heat) is not None:
            yield from _heat_families(heat)


class StageCollector(Collector):
    """Stage times of the one DP group of a colocated service."""

    def __init__(self, times: StageTimes) -> None:
        self._times = times

    def collect(self) -> Iterator[Metric]:
        """The family that workers have, with the one worker dp0."""
        seconds = self._times.seconds().items()
        yield _stages((("dp0", "attention", stage.value), total_s) for stage, total_s in seconds)


def _membership_families(membership: Membership) -> Iterator[Metric]:
    """Who should be there, who is, and which routing holds."""
    members, placement = membership.members, membership.placement
    yield _gauge("membership_epoch", "Epoch of the membership.", membership.epoch)
    if placement is not None:
        yield _gauge("routing_epoch", "Epoch of the placement that is published.", placement.epoch)
    yield _gauges(
        "workers_wanted",
        "Workers that should run.",
        ["role"],
        (((role,), count) for role, count in membership.counts.items()),
    )
    yield _gauges(
        "worker_up",
        "1 if the worker can serve, else 0.",
        WORKER,
        (((member.name, member.spec.role), member.can_serve) for member in members),
    )
    yield _counters(
        "worker_restarts",
        "Starts of the worker after a crash or kill.",
        WORKER,
        (((member.name, member.spec.role), member.num_restarts) for member in members),
    )


def _heartbeat_families(status: Status) -> Iterator[Metric]:
    """Load and stage times of the workers that have sent a heartbeat."""
    beats = [
        ((member.name, member.spec.role), status.heartbeats[member.name])
        for member in status.membership.members
        if member.name in status.heartbeats
    ]
    for key, (name, text) in GAUGES.items():
        samples = ((who, beat.load[key]) for who, beat in beats if key in beat.load)
        yield _gauges(name, text, WORKER, samples)
    for key, (name, text) in COUNTERS.items():
        samples = ((who, beat.load[key]) for who, beat in beats if key in beat.load)
        yield _counters(name, text, WORKER, samples)
    yield _stages(
        ((*who, stage), total_s) for who, beat in beats for stage, total_s in beat.stage_s.items()
    )


def _heat_families(heat: ExpertHeat) -> Iterator[Metric]:
    """How evenly the experts' load lies, and what was done about it."""
    text = "Load of the fullest expert worker over the mean, lately."
    yield _gauge("expert_load_peak_over_mean", text, heat.peak_over_mean)
    yield _counters("expert_moves", "Experts moved to other workers.", (), [((), heat.num_moves)])


def _stages(samples: Samples) -> Metric:
    text = "Time in each stage of a worker's loop; the loops differ by role."
    return _counters("worker_stage_seconds", text, (*WORKER, "stage"), samples)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _gauges(name: str, text: str, labels: Iterable[str], samples: Samples) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=list(labels))
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _counters(name: str, text: str, labels: Iterable[str], samples: Samples) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=list(labels))
    for values, value in samples:
        family.add_metric(values, value)
    return family
