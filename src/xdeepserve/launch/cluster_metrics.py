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
from xdeepserve.launch.life_totals import LifeTotals
from xdeepserve.launch.plan import worker_name
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
    "failovers": ("worker_failovers", "Exchanges of a DP group that went to another worker."),
    "fallbacks": ("worker_fallbacks", "Exchanges that a DP group computed itself."),
    "late_answers": ("worker_late_answers", "Answers that a DP group had given up and dropped."),
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
        self._counts = LifeTotals()
        self._stage_s = LifeTotals()

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
        for member in status.membership.members:
            if (beat := status.heartbeats.get(member.name)) is not None:
                counts = {key: value for key, value in beat.load.items() if key in COUNTERS}
                self._counts.note(member.name, member.incarnation, counts)
                self._stage_s.note(member.name, member.incarnation, beat.stage_s)

    def collect(self) -> Iterator[Metric]:
        """The families of the latest status; none before the first."""
        if self._status is None:
            return
        age_s = self._clock.monotonic() - self._taken_s
        yield _gauge("cluster_status_age_seconds", "Age of what is known of the workers.", age_s)
        yield from _membership_families(self._status.membership)
        text = "Workers that failed and whose work others got."
        yield _counters("workers_dropped", text, (), [((), self._status.num_dropped)])
        yield from _load_families(self._status)
        yield from self._total_families(self._status.membership)
        if (heat := self._status.expert_heat) is not None:
            yield from _heat_families(heat)

    def _total_families(self, membership: Membership) -> Iterator[Metric]:
        """What the workers have counted, over all lives of each that the gateway has seen."""
        names = [((member.name, member.spec.role), member.name) for member in membership.members]
        totals = [(who, self._counts.of(name)) for who, name in names]
        for key, (name, text) in COUNTERS.items():
            samples = ((who, counts[key]) for who, counts in totals if key in counts)
            yield _counters(name, text, WORKER, samples)
        yield _stages(
            ((*who, stage), total_s)
            for who, name in names
            for stage, total_s in self._stage_s.of(name).items()
        )


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


def _load_families(status: Status) -> Iterator[Metric]:
    """Load of the workers that have sent a heartbeat."""
    beats = [
        ((member.name, member.spec.role), status.heartbeats[member.name])
        for member in status.membership.members
        if member.name in status.heartbeats
    ]
    for key, (name, text) in GAUGES.items():
        samples = ((who, beat.load[key]) for who, beat in beats if key in beat.load)
        yield _gauges(name, text, WORKER, samples)


def _heat_families(heat: ExpertHeat) -> Iterator[Metric]:
    """How evenly the experts' load lies, and what was done about it."""
    text = "Load of the fullest expert worker over the mean, lately."
    yield _gauge("expert_load_peak_over_mean", text, heat.peak_over_mean)
    yield _gauges(
        "expert_rank_load_ratio",
        "Load of an expert worker over the mean of all, lately; 1 without load.",
        ["worker"],
        (((worker_name("expert", rank),), ratio) for rank, ratio in heat.rank_ratios.items()),
    )
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
