"""The SLO search on synthetic servers whose best point is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.unit.loadgen.fake_server import FakeRequest, FakeServer, Reply, answer
from xdeepserve.loadgen.bench_serve import BenchConfig
from xdeepserve.loadgen.http_client import HttpClient
from xdeepserve.loadgen.http_connection import ClientError
from xdeepserve.loadgen.runner import Limit
from xdeepserve.loadgen.slo_search import (
    Probe,
    SearchConfig,
    SearchResult,
    find_best,
    run_search,
    verdict,
)
from xdeepserve.loadgen.workload import LengthDistribution, WorkloadConfig

SLO = 50.0


async def search(tpot_ms: Callable[[int], float], max_concurrency: int = 256) -> SearchResult:
    async def measure(concurrency: int) -> Probe:
        tpot = tpot_ms(concurrency)
        return Probe(
            concurrency=concurrency,
            num_requests=8,
            mean_tpot_ms=tpot,
            p99_tpot_ms=tpot,
            mean_ttft_ms=1.0,
            output_tokens_per_s=1000 * concurrency / tpot,
            is_within_slo=tpot <= SLO,
        )

    return await find_best(measure, tpot_slo_ms=SLO, max_concurrency=max_concurrency)


@pytest.mark.parametrize("border", [1, 2, 3, 7, 9])
async def test_small_borders_are_found_exactly(border: int) -> None:
    result = await search(lambda c: 10.0 if c <= border else 99.0)
    assert result.best is not None
    assert result.best.concurrency == border


@pytest.mark.parametrize("border", [37, 100, 255])
async def test_large_borders_are_found_within_a_tenth(border: int) -> None:
    result = await search(lambda c: 10.0 if c <= border else 99.0)
    assert result.best is not None
    assert border * 0.89 <= result.best.concurrency <= border
    assert len(result.probes) <= 14


async def test_search_stops_at_the_limit() -> None:
    result = await search(lambda c: 10.0, max_concurrency=20)
    assert [probe.concurrency for probe in result.probes] == [1, 2, 4, 8, 16, 20]


async def test_no_load_keeps_the_slo() -> None:
    result = await search(lambda c: 60.0)
    assert result.best is None
    assert [probe.concurrency for probe in result.probes] == [1]
    assert "SLO missed" in verdict(result)
    assert "60.0 ms, above 50 ms" in verdict(result)


async def test_best_is_the_highest_rate_not_the_highest_load() -> None:
    # Throughput collapses beyond 4 although the SLO still holds.
    result = await search(lambda c: 5.0 if c <= 4 else 45.0, max_concurrency=8)
    assert result.best is not None
    assert result.best.concurrency == 4
    assert verdict(result).startswith("best: 800.0 output tokens/s at concurrency 4")


def config(output_len: int = 3) -> SearchConfig:
    workload = WorkloadConfig(
        input_len=LengthDistribution("fixed", 4), output_len=LengthDistribution("fixed", output_len)
    )
    bench = BenchConfig(workload=workload, limit=Limit(1), concurrency=1, num_warmups=2)
    return SearchConfig(bench=bench, tpot_slo_ms=1e9, max_concurrency=4, waves=2)


async def test_probes_send_their_requests_with_prompts_of_their_own() -> None:
    probes: list[Probe] = []
    async with FakeServer() as server, HttpClient(server.url) as client:
        result = await run_search(client, "m", config(), on_probe=probes.append)
    assert result.probes == probes
    assert [(probe.concurrency, probe.num_requests) for probe in probes] == [(1, 8), (2, 8), (4, 8)]
    prompts = [tuple(request.json["prompt"]) for request in server.requests]
    assert len(prompts) == len(set(prompts)) == 2 + 3 * 8


async def test_failed_request_ends_the_search() -> None:
    async def fail_late(request: FakeRequest, reply: Reply) -> None:
        if len(server.requests) > 12:
            await reply.send_json({"error": {"message": "full"}}, status=503)
        else:
            await answer(request, reply)

    async with FakeServer(fail_late) as server, HttpClient(server.url) as client:
        with pytest.raises(ClientError, match=r"at concurrency 2: HTTP 503: full"):
            await run_search(client, "m", config(), on_probe=lambda probe: None)
