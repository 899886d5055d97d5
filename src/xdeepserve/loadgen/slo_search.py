"""The headline metric: the highest output rate whose mean TPOT keeps an SLO ("TPS@50ms").

Closed-loop probes over the concurrency: doubling until the SLO breaks, then bisection. The search
is pure; what a probe measures is passed in.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from xdeepserve.errors import ConfigError
from xdeepserve.loadgen.bench_serve import WARMUP_STREAM, BenchConfig, describe_workload, run_bench
from xdeepserve.loadgen.http_client import HttpClient
from xdeepserve.loadgen.http_connection import ClientError
from xdeepserve.loadgen.runner import Limit

MIN_PROBE_REQUESTS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One measured point."""

    concurrency: int
    num_requests: int
    mean_tpot_ms: float
    p99_tpot_ms: float
    mean_ttft_ms: float
    output_tokens_per_s: float
    is_within_slo: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """All probes in the order they ran; `best` is None when even the lowest load misses the SLO."""

    tpot_slo_ms: float
    best: Probe | None
    probes: list[Probe]


Measure = Callable[[int], Awaitable[Probe]]


async def find_best(
    measure: Measure, *, tpot_slo_ms: float, max_concurrency: int, resolution: float = 0.1
) -> SearchResult:
    """Find the concurrency with the highest output rate among those that keep the SLO.

    Args:
        measure: runs one probe at a concurrency.
        max_concurrency: never probed beyond.
        resolution: bisection ends when the step is below this share of the concurrency (or 1).
    """
    probes: list[Probe] = []
    lowest_bad: int | None = None
    highest_good = 0
    concurrency = 1
    while True:
        probe = await measure(concurrency)
        probes.append(probe)
        if probe.is_within_slo:
            highest_good = concurrency
        else:
            lowest_bad = concurrency
        following = _next(highest_good, lowest_bad, max_concurrency, resolution)
        if following is None:
            return SearchResult(tpot_slo_ms=tpot_slo_ms, best=_best(probes), probes=probes)
        concurrency = following


def _next(
    highest_good: int, lowest_bad: int | None, max_concurrency: int, resolution: float
) -> int | None:
    """The next concurrency to probe, or None when the border is found."""
    if lowest_bad is None:
        return None if highest_good >= max_concurrency else min(2 * highest_good, max_concurrency)
    if lowest_bad - highest_good <= max(1.0, resolution * lowest_bad):
        return None
    return (highest_good + lowest_bad) // 2


def _best(probes: Sequence[Probe]) -> Probe | None:
    good = [probe for probe in probes if probe.is_within_slo]
    return max(good, key=lambda probe: probe.output_tokens_per_s, default=None)


def verdict(result: SearchResult) -> str:
    """One sentence: the best point, or that there is none."""
    if result.best is None:
        probe = result.probes[0]
        return (
            f"SLO missed: a single request at a time already has a mean TPOT of "
            f"{probe.mean_tpot_ms:.1f} ms, above {result.tpot_slo_ms:g} ms"
        )
    best = result.best
    return (
        f"best: {best.output_tokens_per_s:.1f} output tokens/s at concurrency "
        f"{best.concurrency}, mean TPOT {best.mean_tpot_ms:.1f} <= {result.tpot_slo_ms:g} ms"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """How to search.

    Attributes:
        bench: workload and warm-up; its concurrency and limit are set for each probe.
        waves: requests per probe = waves x concurrency, at least MIN_PROBE_REQUESTS.
    """

    bench: BenchConfig
    tpot_slo_ms: float
    max_concurrency: int = 256
    waves: int = 4

    def __post_init__(self) -> None:
        if not self.tpot_slo_ms > 0:
            raise ConfigError(f"TPOT SLO {self.tpot_slo_ms} ms must be positive")
        if self.max_concurrency < 1 or self.waves < 1:
            raise ConfigError("max concurrency and waves must be at least 1")


def describe_search(config: SearchConfig) -> dict[str, Any]:
    """The search as JSON-able values."""
    return describe_workload(config.bench.workload) | {
        "num_warmups": config.bench.num_warmups,
        "max_concurrency": config.max_concurrency,
        "waves": config.waves,
    }


async def run_search(
    client: HttpClient, model: str, config: SearchConfig, *, on_probe: Callable[[Probe], None]
) -> SearchResult:
    """Search against a server; `on_probe` is called with each point as it is measured.

    Raises:
        ClientError: a request failed, so the point, and the search, is worth nothing.
    """

    async def measure(concurrency: int) -> Probe:
        probe = await measure_point(client, model, config, concurrency)
        on_probe(probe)
        return probe

    return await find_best(
        measure, tpot_slo_ms=config.tpot_slo_ms, max_concurrency=config.max_concurrency
    )


async def measure_point(
    client: HttpClient, model: str, config: SearchConfig, concurrency: int
) -> Probe:
    """One probe against a server.

    Raises:
        ClientError: a request failed, so the point is worth nothing.
    """
    num_requests = max(MIN_PROBE_REQUESTS, config.waves * concurrency)
    bench = replace(
        config.bench,
        concurrency=concurrency,
        request_rate=None,
        limit=Limit(num_requests),
        # Only the first probe needs the server warmed up.
        num_warmups=config.bench.num_warmups if concurrency == 1 else 0,
        # Each probe has prompts of its own, or the prefix cache would answer the later ones.
        stream=WARMUP_STREAM + concurrency,
    )
    metrics = (await run_bench(client, model, bench)).metrics
    if metrics.num_failed:
        message = next(iter(metrics.errors))
        raise ClientError(
            f"{metrics.num_failed} of {num_requests} requests failed at concurrency "
            f"{concurrency}: {message}"
        )
    if metrics.tpot_ms is None or metrics.ttft_ms is None:
        raise ConfigError("TPOT needs answers of at least two tokens; raise the output length")
    return Probe(
        concurrency=concurrency,
        num_requests=num_requests,
        mean_tpot_ms=metrics.tpot_ms.mean,
        p99_tpot_ms=metrics.tpot_ms.p99,
        mean_ttft_ms=metrics.ttft_ms.mean,
        output_tokens_per_s=metrics.output_tokens_per_s,
        is_within_slo=metrics.tpot_ms.mean <= config.tpot_slo_ms,
    )
