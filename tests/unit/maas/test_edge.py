"""Bodies, headers, request ids, health, metrics: the edge without generation."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.maas.asgi import MODEL, Call, call, open_app
from tests.unit.maas.replay_engine import ReplayEngine, steps_of
from xdeepserve.config import GatewayConfig
from xdeepserve.maas import body as body_module

ASK = {"model": MODEL, "prompt": "hello"}
PATH = "/v1/completions"


async def test_body_limit_by_header_and_while_reading() -> None:
    app = open_app(ReplayEngine(steps_of("x")), config=GatewayConfig(max_body_bytes=100))
    declared = await call(app, PATH, b"{}", headers={"content-length": "101"})
    read = await call(app, PATH, chunks=[b"x" * 60, b"y" * 60, b"z"])
    for reply in (declared, read):
        assert reply.status == 413
        assert reply.json()["error"]["code"] == "request_too_large"
        assert reply.headers["connection"] == "close"


async def test_client_that_goes_away_while_sending_its_body() -> None:
    engine = ReplayEngine(steps_of("x"))
    running = Call(open_app(engine), PATH, chunks=[b'{"model', b""])
    running._inbox.get_nowait()
    running._inbox.get_nowait()
    running._inbox.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
    running.disconnect()
    await running.task
    assert engine.requests == []


async def test_slow_body_is_a_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "READ_TIMEOUT_S", 0.0)
    running = Call(open_app(ReplayEngine()), PATH, chunks=[b"{", b"}"])
    running._inbox.get_nowait()
    running._inbox.get_nowait()
    await running.task
    assert running.status == 408


@pytest.mark.parametrize(
    ("sent", "is_kept"), [("abc-1.X_2", True), ("a b", False), ("x" * 129, False), ("", False)]
)
async def test_request_id_is_echoed_if_sane(sent: str, is_kept: bool) -> None:
    app = open_app(ReplayEngine())
    reply = await call(app, "/health", method="GET", headers={"x-request-id": sent})
    assert (reply.headers["x-request-id"] == sent) is is_kept
    assert len(reply.headers["x-request-id"]) > 0


async def test_unknown_path_and_method() -> None:
    app = open_app(ReplayEngine())
    missing = await call(app, "/v1/nothing", method="GET")
    wrong = await call(app, PATH, method="GET")
    assert (missing.status, wrong.status) == (404, 405)
    assert wrong.headers["allow"] == "POST"
    for reply in (missing, wrong):
        assert reply.json()["error"]["type"] == "invalid_request_error"


async def test_health_and_ready_follow_the_engine_and_the_drain() -> None:
    engine = ReplayEngine()
    app = open_app(engine)

    async def statuses() -> list[int]:
        return [(await call(app, path, method="GET")).status for path in ("/health", "/ready")]

    assert await statuses() == [200, 200]
    app.state.gateway.begin_drain()
    assert await statuses() == [200, 503]
    refused = await call(app, PATH, ASK)
    assert (refused.status, refused.json()["error"]["code"]) == (503, "draining")
    assert refused.headers["retry-after"] == "1"
    engine.is_dead = True
    assert await statuses() == [503, 503]


async def test_dead_engine_refuses_requests() -> None:
    engine = ReplayEngine()
    engine.is_dead = True
    reply = await call(open_app(engine), PATH, ASK)
    assert (reply.status, reply.json()["error"]["code"]) == (503, "engine_dead")


async def test_metrics_show_engine_and_gateway_numbers() -> None:
    app = open_app(ReplayEngine(steps_of("abcdef"), num_cached_tokens=2))
    await call(app, PATH, {**ASK, "stream": True})
    text = (await call(app, "/metrics", method="GET")).body.decode()
    label = '{model_name="toy"}'
    for line in (
        f"xdeepserve:num_requests_running{label} 0.0",
        f"xdeepserve:num_requests_waiting{label} 3.0",
        f"xdeepserve:kv_cache_usage_perc{label} 0.25",
        f"xdeepserve:num_preemptions_total{label} 5.0",
        f"xdeepserve:prompt_tokens_total{label} 7.0",
        f"xdeepserve:generation_tokens_total{label} 11.0",
        f"xdeepserve:prefix_cache_queries_total{label} 13.0",
        f"xdeepserve:prefix_cache_hits_total{label} 2.0",
        'xdeepserve:request_success_total{finished_reason="stop",model_name="toy"} 1.0',
        f"xdeepserve:time_to_first_token_seconds_count{label} 1.0",
        f"xdeepserve:inter_token_latency_seconds_count{label} 2.0",
        f"xdeepserve:e2e_request_latency_seconds_count{label} 1.0",
        f"xdeepserve:request_generation_tokens_sum{label} 7.0",
    ):
        assert line in text.splitlines()


async def test_lifespan_closes_the_engine() -> None:
    engine = ReplayEngine()
    app = open_app(engine)
    inbox: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    inbox.put_nowait({"type": "lifespan.startup"})
    inbox.put_nowait({"type": "lifespan.shutdown"})
    sent: list[str] = []

    async def send(message: dict[str, str]) -> None:
        sent.append(message["type"])

    await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, inbox.get, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert engine.is_closed
    assert app.state.gateway.is_draining
