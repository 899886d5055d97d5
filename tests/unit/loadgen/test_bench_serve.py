"""`run_bench` and the `bench serve` command against the fake server."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

from tests.unit.loadgen.fake_server import FakeRequest, FakeServer, Reply, answer, served
from xdeepserve.errors import ConfigError
from xdeepserve.loadgen.bench_serve import BenchConfig, run_bench
from xdeepserve.loadgen.cli import add_bench_serve_arguments, run_bench_serve
from xdeepserve.loadgen.http_client import HttpClient
from xdeepserve.loadgen.http_connection import ClientError, ConnectFailed
from xdeepserve.loadgen.runner import Limit
from xdeepserve.loadgen.workload import LengthDistribution, WorkloadConfig

SMALL = ["--input-len", "4", "--output-len", "3"]


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_bench_serve_arguments(parser)
    return parser.parse_args(flags)


def command(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON of the last stdout line, and all of stdout."""
    code = run_bench_serve(parse(*SMALL, *flags))
    out = capsys.readouterr().out
    return code, json.loads(out.splitlines()[-1]), out


async def refuse(request: FakeRequest, reply: Reply) -> None:
    if request.path == "/v1/models":
        await answer(request, reply)
    else:
        await reply.send_json({"error": {"message": "full"}}, status=503)


def small_config(**changes: Any) -> BenchConfig:
    lengths = LengthDistribution("fixed", 4), LengthDistribution("fixed", 3)
    workload = WorkloadConfig(input_len=lengths[0], output_len=lengths[1])
    return BenchConfig(workload=workload, **({"concurrency": 2, "limit": Limit(6)} | changes))


async def test_run_counts_requests_and_tokens_but_not_warm_ups() -> None:
    async with FakeServer() as server, HttpClient(server.url) as client:
        result = await run_bench(client, "m", small_config(num_warmups=3))
    assert len(server.requests) == 9
    assert server.num_connections == 2
    metrics = result.metrics
    assert (metrics.num_completed, metrics.num_failed) == (6, 0)
    assert (metrics.num_prompt_tokens, metrics.num_output_tokens) == (24, 18)
    assert metrics.counted_by == "usage"


async def test_failed_warm_up_stops_before_measuring() -> None:
    async with FakeServer(refuse) as server, HttpClient(server.url) as client:
        with pytest.raises(ClientError, match="warm-up request failed: HTTP 503"):
            await run_bench(client, "m", small_config(num_warmups=1))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"concurrency": 0},
        {"concurrency": None},
        {"request_rate": 1.0},
        {"concurrency": None, "request_rate": 0.0},
        {"concurrency": None, "request_rate": float("nan")},
        {"burstiness": 0.0},
        {"limit": Limit()},
    ],
)
def test_contradicting_config_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        small_config(**changes)


def test_closed_loop_command_ends_in_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    with served() as server:
        code, document, out = command(
            capsys, "--url", server.url, "--concurrency", "2", "--num-prompts", "5", "--seed", "9"
        )
    assert code == 0
    assert document["benchmark"] == "serve"
    assert document["model"] == "fake-model"
    assert document["results"]["num_completed"] == 5
    assert set(document["results"]["ttft_ms"]) == {"mean", "p50", "p90", "p99", "max"}
    assert document["config"]["seed"] == 9
    assert document["config"]["input_len"] == "4"
    assert document["machine"]["cores"] >= 1
    assert "TPOT" in out


def test_open_loop_command_reports_goodput(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--request-rate", "1000", "--num-prompts", "5", "--goodput", "ttft:60000", "e2e:60000"]
    with served() as server:
        code, document, out = command(capsys, "--url", server.url, *flags)
    assert code == 0
    assert document["results"]["goodput"]["share"] == 1.0
    assert document["config"]["request_rate"] == 1000
    assert "goodput (ttft <= 60000 ms, e2e <= 60000 ms)" in out


def test_chat_endpoint_sends_words(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--endpoint", "chat", "--num-prompts", "2", "--num-warmups", "0", "--model", "other"]
    with served() as server:
        code, document, _ = command(capsys, "--url", server.url, *flags)
    assert (code, document["model"]) == (0, "other")
    chats = [request.json for request in server.requests if request.method == "POST"]
    assert all(len(chat["messages"][0]["content"].split()) == 4 for chat in chats)


def test_failed_requests_show_and_fail_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with served(refuse) as server:
        code, document, out = command(
            capsys, "--url", server.url, "--num-prompts", "3", "--num-warmups", "0"
        )
    assert code == 1
    assert document["results"]["num_failed"] == 3
    assert document["results"]["errors"] == {"HTTP 503: full": 3}
    assert "failed 3 x: HTTP 503: full" in out


def test_api_key_reaches_the_server_and_not_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    with served() as server:
        _, _, out = command(capsys, "--url", server.url, "--api-key", "hush", "--num-prompts", "1")
    assert server.requests[0].headers["authorization"] == "Bearer hush"
    assert "hush" not in out


def test_search_command_prints_probes_and_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tpot-slo-ms", "1e9", "--max-concurrency", "2", "--waves", "1"]
    with served() as server:
        code, document, out = command(capsys, "--url", server.url, *flags)
    assert code == 0
    assert [probe["concurrency"] for probe in document["results"]["probes"]] == [1, 2]
    assert document["results"]["best"]["is_within_slo"] is True
    assert "best: " in out


def test_unreachable_server_is_one_typed_error() -> None:
    with served() as server:
        url = server.url
    with pytest.raises(ConnectFailed, match="cannot connect"):
        run_bench_serve(parse("--url", url))


def test_search_refuses_flags_it_sets_itself() -> None:
    with pytest.raises(ConfigError, match="remove --concurrency"):
        run_bench_serve(parse("--tpot-slo-ms", "50", "--concurrency", "4"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--input-len", "none"],
        ["--token-range", "9:3"],
        ["--extra-body", "[1]"],
        ["--concurrency", "0"],
        ["--concurrency", "2", "--request-rate", "3"],
    ],
)
def test_wrong_flags_are_usage_errors(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(*flags)
    assert flags[-2] in capsys.readouterr().err


def test_runs_without_a_seed_ask_for_different_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    with served() as server:
        documents = [
            command(capsys, "--url", server.url, "--num-prompts", "1", "--num-warmups", "0")[1]
            for _ in range(2)
        ]
    prompts = [request.json["prompt"] for request in server.requests if request.method == "POST"]
    assert prompts[0] != prompts[1]
    assert documents[0]["config"]["seed"] != documents[1]["config"]["seed"]
