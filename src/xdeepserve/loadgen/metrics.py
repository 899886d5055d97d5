"""From request records to the field's metrics: TTFT, TPOT, ITL, E2E, throughput, goodput.

Pure functions; seconds in, milliseconds out. Definitions: docs/benchmarking.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from xdeepserve.errors import ConfigError
from xdeepserve.loadgen.runner import RequestRecord

SLO_METRICS: Final = ("ttft", "tpot", "e2e")
MAX_ERRORS_LISTED: Final = 10

CountedBy = Literal["usage", "chunks", "mixed"]


def percentile(ordered: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) of ascending values, interpolated linearly.

    The same rule as NumPy's default. NaN for no values.
    """
    if not ordered:
        return math.nan
    position = (len(ordered) - 1) * q / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True, slots=True)
class Summary:
    """A distribution in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of_seconds(cls, values_s: Iterable[float]) -> Summary | None:
        """None for no values."""
        ordered = sorted(value * 1e3 for value in values_s)
        if not ordered:
            return None
        p50, p90, p99 = (percentile(ordered, q) for q in (50, 90, 99))
        return cls(math.fsum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that met every target, per second and as a share of all requests sent."""

    slo_ms: dict[str, float]
    requests_per_s: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchMetrics:
    """Results of one run. Latencies cover the completed requests; None where nothing applies.

    Attributes:
        duration_s: first request due to last answer ended.
        num_wrong_length: completed answers whose token count is not the one asked for.
        num_cached_tokens: prompt tokens the server says came from its prefix cache.
        counted_by: whether token counts come from the server's usage or from counting chunks.
        errors: message -> number of failed requests.
        lag_ms_p99: how late the client sent its requests (open loop); large = client saturated.
    """

    duration_s: float
    num_completed: int
    num_failed: int
    num_wrong_length: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    counted_by: CountedBy
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_ms: Summary | None
    tpot_ms: Summary | None
    itl_ms: Summary | None
    e2e_ms: Summary | None
    goodput: Goodput | None
    errors: dict[str, int]
    lag_ms_p99: float


def compute_metrics(
    records: Sequence[RequestRecord], *, slo_ms: Mapping[str, float] | None = None
) -> BenchMetrics:
    """Summarize a run of at least one request. Failed requests count only as failures."""
    completed = [record for record in records if record.error is None]
    failed = [record.error for record in records if record.error is not None]
    started_s = min(record.timeline.arrived_s for record in records)
    duration_s = max(1e-9, max(record.ended_s for record in records) - started_s)
    usages = [record.usage for record in completed if record.usage is not None]
    num_prompt = sum(usage.prompt_tokens for usage in usages)
    num_output = sum(record.timeline.num_output_tokens for record in completed)
    return BenchMetrics(
        duration_s=duration_s,
        num_completed=len(completed),
        num_failed=len(failed),
        num_wrong_length=sum(r.timeline.num_output_tokens != r.output_len for r in completed),
        num_prompt_tokens=num_prompt,
        num_cached_tokens=sum(usage.cached_tokens for usage in usages),
        num_output_tokens=num_output,
        counted_by=_counted_by(len(usages), len(completed)),
        requests_per_s=len(completed) / duration_s,
        output_tokens_per_s=num_output / duration_s,
        total_tokens_per_s=(num_prompt + num_output) / duration_s,
        ttft_ms=Summary.of_seconds(_known(r.timeline.ttft_s for r in completed)),
        tpot_ms=Summary.of_seconds(_known(r.timeline.tpot_s for r in completed)),
        itl_ms=Summary.of_seconds(gap for r in completed for gap in r.gaps_s),
        e2e_ms=Summary.of_seconds(r.e2e_s for r in completed),
        goodput=_goodput(records, slo_ms, duration_s) if slo_ms else None,
        errors=dict(Counter(failed).most_common(MAX_ERRORS_LISTED)),
        lag_ms_p99=percentile(sorted(r.lag_s * 1e3 for r in records), 99),
    )


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _counted_by(num_usages: int, num_completed: int) -> CountedBy:
    if num_usages == num_completed:
        return "usage"
    return "mixed" if num_usages else "chunks"


def _goodput(
    records: Sequence[RequestRecord], slo_ms: Mapping[str, float], duration_s: float
) -> Goodput:
    num_good = sum(meets_slo(record, slo_ms) for record in records)
    return Goodput(dict(slo_ms), num_good / duration_s, num_good / len(records))


def meets_slo(record: RequestRecord, slo_ms: Mapping[str, float]) -> bool:
    """Whether a request completed within every target; a single-token answer has no TPOT."""
    if record.error is not None:
        return False
    measured = {
        "ttft": record.timeline.ttft_s,
        "tpot": record.timeline.tpot_s,
        "e2e": record.e2e_s,
    }
    return all(
        (value := measured[name]) is None or value * 1e3 <= limit for name, limit in slo_ms.items()
    )


def parse_slo(items: Sequence[str]) -> dict[str, float]:
    """`["ttft:500", "tpot:50"]` -> {"ttft": 500.0, "tpot": 50.0} (milliseconds).

    Raises:
        ConfigError: an unknown metric or a limit that is not a positive number.
    """
    slo_ms: dict[str, float] = {}
    for item in items:
        name, _, limit = item.partition(":")
        if name not in SLO_METRICS:
            raise ConfigError(f"goodput {item!r}: the metric must be one of {SLO_METRICS}")
        try:
            slo_ms[name] = float(limit)
        except ValueError as exc:
            raise ConfigError(f"goodput {item!r} must look like {name}:MILLISECONDS") from exc
        if not 0 < slo_ms[name] < math.inf:
            raise ConfigError(f"goodput {item!r}: the limit must be a positive number")
    return slo_ms
