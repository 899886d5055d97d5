"""`bench serve`: one measured run of a workload against a server.

Data flow: BenchConfig -> Workload -> runner (records) -> metrics -> BenchResult.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from xdeepserve.clock import SYSTEM_CLOCK, Clock
from xdeepserve.errors import ConfigError
from xdeepserve.loadgen.http_client import HttpClient
from xdeepserve.loadgen.http_connection import ClientError
from xdeepserve.loadgen.metrics import BenchMetrics, compute_metrics
from xdeepserve.loadgen.report import ProgressBar, machine_fingerprint
from xdeepserve.loadgen.runner import (
    Arrivals,
    Limit,
    RequestRecord,
    RequestSender,
    run_closed_loop,
    run_open_loop,
)
from xdeepserve.loadgen.workload import Workload, WorkloadConfig

WARMUP_STREAM = 1
"""Number of the workload stream that warm-up requests come from; measured runs use others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """One run. Exactly one of `concurrency` (closed loop) and `request_rate` (open loop) is set.

    Attributes:
        limit: when to stop sending.
        num_warmups: requests sent before, at the run's concurrency, and not measured.
        burstiness: shape of the open loop's gamma-distributed gaps; 1 = Poisson.
        slo_ms: goodput targets, metric -> milliseconds.
        stream: number of the workload stream; runs with different ones share no prompts.
    """

    workload: WorkloadConfig
    limit: Limit
    concurrency: int | None = None
    request_rate: float | None = None
    burstiness: float = 1.0
    num_warmups: int = 0
    slo_ms: dict[str, float] = field(default_factory=dict)
    stream: int = 0

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.request_rate is None):
            raise ConfigError("set either concurrency (closed loop) or request rate (open loop)")
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(f"concurrency={self.concurrency} must be at least 1")
        if self.request_rate is not None and not 0 < self.request_rate <= 1e6:
            raise ConfigError(f"request rate {self.request_rate} must lie between 0 and 1e6")
        if not 0 < self.burstiness <= 1e6:
            raise ConfigError(f"burstiness {self.burstiness} must lie between 0 and 1e6")
        if self.limit.num_requests is None and self.limit.duration_s is None:
            raise ConfigError("set a number of prompts or a duration, or the run never ends")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """Metrics of one run, and the share of a core that the client itself used meanwhile."""

    model: str
    config: BenchConfig
    metrics: BenchMetrics
    client_cpu_share: float

    def to_document(self, url: str) -> dict[str, Any]:
        """The JSON document of `bench serve`."""
        return {
            "benchmark": "serve",
            "url": url,
            "model": self.model,
            "config": describe(self.config),
            "machine": machine_fingerprint(),
            "client_cpu_share": round(self.client_cpu_share, 3),
            "results": self.metrics,
        }


def describe_workload(workload: WorkloadConfig) -> dict[str, Any]:
    """The workload as JSON-able values; a dataset is described by its size."""
    return {
        "endpoint": workload.endpoint,
        "input_len": str(workload.input_len),
        "output_len": str(workload.output_len),
        "dataset_rows": len(workload.dataset),
        "shared_prefix_len": workload.shared_prefix_len,
        "token_range": workload.token_range,
        "ignore_eos": workload.ignore_eos,
        "seed": workload.seed,
        "extra_body": workload.extra_body,
    }


def describe(config: BenchConfig) -> dict[str, Any]:
    """Workload and load of a run as JSON-able values."""
    return describe_workload(config.workload) | {
        "concurrency": config.concurrency,
        "request_rate": config.request_rate,
        "burstiness": config.burstiness,
        "num_prompts": config.limit.num_requests,
        "duration_s": config.limit.duration_s,
        "num_warmups": config.num_warmups,
    }


async def run_bench(
    client: HttpClient, model: str, config: BenchConfig, *, clock: Clock = SYSTEM_CLOCK
) -> BenchResult:
    """Warm up, run the workload, summarize. Failed requests are counted in the result.

    Raises:
        ClientError: a warm-up request failed; nothing was measured.
    """
    workload = Workload(config.workload, model)
    sender = RequestSender(client, clock)
    if config.num_warmups:
        await _warm_up(sender, workload, config, clock)
    cpu_before = time.process_time()
    with _progress(config.limit.num_requests, "bench") as bar:
        records = await _measure(sender, workload, config, clock, bar)
    if not records:
        raise ConfigError("no request was due within the duration; make it longer")
    metrics = compute_metrics(records, slo_ms=config.slo_ms)
    cpu_s = time.process_time() - cpu_before
    return BenchResult(
        model=model, config=config, metrics=metrics, client_cpu_share=cpu_s / metrics.duration_s
    )


@contextmanager
def _progress(total: int | None, label: str) -> Iterator[ProgressBar]:
    bar = ProgressBar(total, label)
    try:
        yield bar
    finally:
        bar.close()


async def _warm_up(
    sender: RequestSender, workload: Workload, config: BenchConfig, clock: Clock
) -> None:
    with _progress(config.num_warmups, "warm-up") as bar:
        records = await run_closed_loop(
            sender.send,
            workload.requests(stream=WARMUP_STREAM),
            concurrency=min(config.concurrency or 1, config.num_warmups),
            limit=Limit(config.num_warmups),
            on_record=lambda record: bar.advance(is_failed=record.error is not None),
            clock=clock,
        )
    for record in records:
        if record.error is not None:
            raise ClientError(f"a warm-up request failed: {record.error}")


async def _measure(
    sender: RequestSender, workload: Workload, config: BenchConfig, clock: Clock, bar: ProgressBar
) -> list[RequestRecord]:
    def on_record(record: RequestRecord) -> None:
        bar.advance(is_failed=record.error is not None)

    requests = workload.requests(stream=config.stream)
    if config.request_rate is None:
        assert config.concurrency is not None
        return await run_closed_loop(
            sender.send,
            requests,
            concurrency=config.concurrency,
            limit=config.limit,
            on_record=on_record,
            clock=clock,
        )
    return await run_open_loop(
        sender.send,
        requests,
        arrivals=Arrivals(config.request_rate, config.burstiness, config.workload.seed),
        limit=config.limit,
        on_record=on_record,
        clock=clock,
    )
