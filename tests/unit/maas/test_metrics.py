"""GET /metrics: the gateway's own numbers, and those of added collectors."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tests.unit.maas.asgi import MODEL, call
from tests.unit.maas.replay_engine import ReplayEngine, steps_of
from tests.unit.text.byte_tokenizer import byte_tokenizer
from xdeepserve.config import GatewayConfig
from xdeepserve.maas.app import create_app


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
