"""Prometheus metrics, names in vLLM's style under the prefix `xdeepserve:`.

The gateway owns the latency histograms and outcome counters; queue and cache numbers are read from
the engine's LoadReport when somebody scrapes. Whoever composes the app may add collectors.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from xdeepserve.config import SloConfig
from xdeepserve.engine_api import EngineClient
from xdeepserve.messages import LoadReport, Usage
from xdeepserve.telemetry import RequestTimeline

PREFIX = "xdeepserve:"
LABEL = "model_name"
_STEP_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
)  # fmt: skip
_REQUEST_BUCKETS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
_TOKEN_BUCKETS = tuple(float(1 << i) for i in range(0, 18))


class EngineCollector(Collector):
    """Gauges and counters that the engine keeps, read at scrape time."""

    def __init__(self, engine: EngineClient, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        """One family per number of the LoadReport that has a standard name."""
        load = self._engine.load()
        gauges: dict[str, tuple[str, float]] = {
            "num_requests_running": ("Requests being computed.", load.num_running),
            "num_requests_waiting": ("Requests in the waiting queue.", load.num_waiting),
            "kv_cache_usage_perc": ("Share of KV blocks in use, 0 to 1.", load.kv_usage),
        }
        counters: dict[str, tuple[str, int]] = {
            "prefix_cache_queries": ("Tokens looked up.", load.prefix_cache_queries),
            "prefix_cache_hits": ("Tokens found.", load.prefix_cache_hits),
            "num_preemptions": ("Requests preempted.", load.num_preemptions),
            "prompt_tokens": ("Prompt tokens processed.", load.num_prompt_tokens),
            "generation_tokens": ("Tokens generated.", load.num_generated_tokens),
            "engine_steps": ("Engine steps.", load.num_steps),
            "spec_decode_num_drafts": ("Sequences of drafts checked.", load.num_drafts),
            "spec_decode_num_draft_tokens": ("Draft tokens checked.", load.num_draft_tokens),
            "spec_decode_num_accepted_tokens": (
                "Draft tokens that became output.",
                load.num_accepted_tokens,
            ),
        }
        for name, (doc, value) in gauges.items():
            gauge = GaugeMetricFamily(PREFIX + name, doc, labels=[LABEL])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, (doc, count) in counters.items():
            counter = CounterMetricFamily(PREFIX + name, doc, labels=[LABEL])
            counter.add_metric([self._model_name], count)
            yield counter
        yield self._accepted_per_position(load)

    def _accepted_per_position(self, load: LoadReport) -> Metric:
        counter = CounterMetricFamily(
            PREFIX + "spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens that became output, by their place among the drafts.",
            labels=[LABEL, "position"],
        )
        for position, count in enumerate(load.accepted_per_position):
            counter.add_metric([self._model_name, str(position)], count)
        return counter


class GatewayMetrics:
    """Everything `/metrics` shows. One per app, in a registry of its own."""

    def __init__(self, engine: EngineClient, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine, model_name))
        ProcessCollector(registry=self.registry)
        self._model_name = model_name
        self._slo: SloConfig | None = None
        self._success = Counter(
            PREFIX + "request_success",
            "Requests that ended, by finish reason.",
            [LABEL, "finished_reason"],
            registry=self.registry,
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "TTFT.", _REQUEST_BUCKETS)
        self._itl = self._histogram("inter_token_latency_seconds", "ITL.", _STEP_BUCKETS)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "Mean TPOT of a request.", _STEP_BUCKETS
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "E2E.", _REQUEST_BUCKETS)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens.", _TOKEN_BUCKETS)
        self._output = self._histogram(
            "request_generation_tokens", "Output tokens.", _TOKEN_BUCKETS
        )

    def count_objectives(self, slo: SloConfig) -> None:
        """Count from now on how many choices keep these; call once."""
        self._slo = slo
        self._kept = Counter(
            PREFIX + "request_slo",
            "Choices for which TTFT or TPOT is known, by whether it was within its objective.",
            [LABEL, "objective", "kept"],
            registry=self.registry,
        )

    def on_tokens(self, *, timeline: RequestTimeline, count: int, now_s: float) -> None:
        """Observe TTFT or ITL; call before `timeline.on_tokens`."""
        if count <= 0:
            return
        if timeline.last_token_s is None:
            self._ttft.observe(now_s - timeline.arrived_s)
        else:
            self._itl.observe(now_s - timeline.last_token_s)

    def on_finished(
        self, *, timeline: RequestTimeline, usage: Usage, finish_reason: str, now_s: float
    ) -> None:
        """Observe one choice that ended, whatever the reason."""
        self._success.labels(self._model_name, finish_reason).inc()
        self._e2e.observe(now_s - timeline.arrived_s)
        self._prompt.observe(usage.num_prompt_tokens)
        self._output.observe(usage.num_output_tokens)
        if timeline.tpot_s is not None:
            self._tpot.observe(timeline.tpot_s)
        if self._slo is not None:
            self._judge("ttft", timeline.ttft_s, self._slo.ttft_ms)
            self._judge("tpot", timeline.tpot_s, self._slo.tpot_ms)

    def _judge(self, objective: str, measured_s: float | None, target_ms: float) -> None:
        if measured_s is not None and target_ms > 0:
            kept = "true" if 1000 * measured_s <= target_ms else "false"
            self._kept.labels(self._model_name, objective, kept).inc()

    def _histogram(self, name: str, doc: str, buckets: tuple[float, ...]) -> Histogram:
        parent = Histogram(PREFIX + name, doc, [LABEL], registry=self.registry, buckets=buckets)
        return parent.labels(self._model_name)


async def get_metrics(request: Request) -> Response:
    """GET /metrics."""
    registry: CollectorRegistry = request.app.state.gateway.metrics.registry
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)
