"""GET /metrics: the gateway's own numbers, and those of added collectors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tests.unit.maas.asgi import MODEL, call
from tests.unit.maas.replay_engine import ReplayEngine, steps_of
from tests.unit.text.byte_tokenizer import byte_tokenizer
from xdeepserve.config import GatewayConfig, SloConfig
from xdeepserve.maas.app import create_app
from xdeepserve.maas.metrics import GatewayMetrics
from xdeepserve.messages import Usage
from xdeepserve.telemetry import RequestTimeline


class Answer(Collector):
    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("xdeepserve:answer", "A number.", value=42)


async def test_metrics() -> None:
    app = create_app(
        ReplayEngine(steps_of("hi")),
        byte_tokenizer(chat_template=None),
        GatewayConfig(),
        model_names=[MODEL],
        collectors=[Answer()],
    )
    done = await call(app, "/v1/completions", {"model": MODEL, "prompt": "a"})
    assert done.status == 200
    scrape = await call(app, "/metrics", method="GET")
    assert scrape.status == 200
    assert scrape.headers["content-type"].startswith("text/plain")
    lines = scrape.body.decode().splitlines()
    assert "xdeepserve:answer 42.0" in lines
    ended = f'xdeepserve:request_success_total{{finished_reason="stop",model_name="{MODEL}"}} 1.0'
    assert ended in lines


def test_speculation_is_counted_under_the_field_s_names() -> None:
    lines = generate_latest(GatewayMetrics(ReplayEngine(), MODEL).registry).decode().splitlines()
    name, label = "xdeepserve:spec_decode_num", f'model_name="{MODEL}"'
    assert f"{name}_drafts_total{{{label}}} 3.0" in lines
    assert f"{name}_draft_tokens_total{{{label}}} 12.0" in lines
    assert f"{name}_accepted_tokens_total{{{label}}} 7.0" in lines
    by_position = [
        line for line in lines if line.startswith(f"{name}_accepted_tokens_per_pos_total")
    ]
    assert [line.split()[-1] for line in by_position] == ["3.0", "2.0", "2.0", "0.0"]
    assert 'position="3"' in by_position[3]


def slo_lines(metrics: GatewayMetrics) -> dict[tuple[str, str], float]:
    """(objective, kept) -> choices."""
    family = "xdeepserve:request_slo_total"
    return {
        (sample.labels["objective"], sample.labels["kept"]): sample.value
        for metric in metrics.registry.collect()
        for sample in metric.samples
        if sample.name == family
    }


@pytest.mark.parametrize(
    ("slo", "expected"),
    [
        (SloConfig(ttft_ms=0, tpot_ms=0), {}),
        (
            SloConfig(ttft_ms=1000, tpot_ms=60),
            {("ttft", "true"): 1, ("ttft", "false"): 1, ("tpot", "true"): 1},
        ),
        (SloConfig(ttft_ms=0, tpot_ms=40), {("tpot", "false"): 1}),
    ],
)
def test_choices_within_the_objectives_are_counted(
    slo: SloConfig, expected: dict[tuple[str, str], float]
) -> None:
    metrics = GatewayMetrics(ReplayEngine(), MODEL)
    metrics.count_objectives(slo)
    quick = RequestTimeline(0.0, first_token_s=1.0, last_token_s=1.1, num_output_tokens=3)
    slow = RequestTimeline(0.0, first_token_s=1.1, last_token_s=1.1, num_output_tokens=1)
    nothing = RequestTimeline(0.0)
    for timeline in (quick, slow, nothing):
        usage = Usage(num_prompt_tokens=1, num_output_tokens=timeline.num_output_tokens)
        metrics.on_finished(timeline=timeline, usage=usage, finish_reason="stop", now_s=2.0)
    assert slo_lines(metrics) == expected
