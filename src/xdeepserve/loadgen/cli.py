"""Entry points of `bench serve` and `chat`; `launch` mounts both on its parser.

Exit codes: 0 all well, 1 requests failed. Typed errors (an unreachable server, wrong flags) are
raised; the program's `main` makes one line and an exit code of them.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial

from xdeepserve.loadgen.arguments import (
    add_bench_serve_arguments,
    add_chat_arguments,
    bench_config,
    chat_options,
    search_config,
)
from xdeepserve.loadgen.bench_serve import BenchConfig, run_bench
from xdeepserve.loadgen.chat import chat
from xdeepserve.loadgen.http_client import HttpClient
from xdeepserve.loadgen.http_connection import HttpStatusError, Timeouts
from xdeepserve.loadgen.openai_stream import first_model
from xdeepserve.loadgen.report import json_line, machine_fingerprint, print_metrics, warnings_for
from xdeepserve.loadgen.slo_search import (
    Probe,
    SearchConfig,
    describe_search,
    run_search,
    verdict,
)

__all__ = ["add_bench_serve_arguments", "add_chat_arguments", "run_bench_serve", "run_chat"]

_PROBE_COLUMNS = "{:>12}{:>10}{:>12}{:>12}{:>12}{:>14}  {}"


def run_bench_serve(args: argparse.Namespace) -> int:
    """Carry out `bench serve`; the last line on stdout is one JSON document.

    Returns:
        Exit code: 1 when requests failed.

    Raises:
        ConfigError: contradicting flags.
        ClientError: the server cannot be reached, or a warm-up request or search probe failed.
    """
    return asyncio.run(_bench_serve(args))


def run_chat(args: argparse.Namespace) -> int:
    """Carry out `chat`; with piped stdin every line is a question.

    Returns:
        Exit code: 1 when a piped question failed.

    Raises:
        ClientError: the server cannot be reached.
    """
    num_failed = chat(
        args.url,
        args.model,
        api_key=args.api_key,
        system=args.system,
        options=chat_options(args),
    )
    return 1 if num_failed and not sys.stdin.isatty() else 0


async def _bench_serve(args: argparse.Namespace) -> int:
    search = search_config(args)
    run: Callable[[HttpClient, str], Awaitable[int]]
    if search is None:
        run = partial(_bench, config=bench_config(args))
    else:
        run = partial(_search, config=search)
    timeouts = Timeouts(first_byte_s=args.timeout)
    async with HttpClient(args.url, api_key=args.api_key, timeouts=timeouts) as client:
        return await run(client, await _served_model(client, args.model))


async def _served_model(client: HttpClient, named: str | None) -> str:
    """The model to ask for; fails here, in one line, when the server is not there."""
    try:
        listed = await first_model(client)
    except HttpStatusError:
        if named is None:
            raise
        return named  # a server without a model list is still worth measuring
    return named or listed


async def _bench(client: HttpClient, model: str, *, config: BenchConfig) -> int:
    result = await run_bench(client, model, config)
    print_metrics(result.metrics)
    for note in warnings_for(result.metrics, shared_prefix=config.workload.shared_prefix_len > 0):
        print(f"note: {note}")
    print(json_line(result.to_document(str(client.origin))))
    return 1 if result.metrics.num_failed else 0


async def _search(client: HttpClient, model: str, *, config: SearchConfig) -> int:
    header = ("concurrency", "requests", "TPOT ms", "p99 ms", "TTFT ms", "output tok/s", "SLO")
    print(_PROBE_COLUMNS.format(*header))
    result = await run_search(client, model, config, on_probe=_print_probe)
    print(verdict(result))
    document = {
        "benchmark": "serve-slo-search",
        "url": str(client.origin),
        "model": model,
        "config": describe_search(config),
        "machine": machine_fingerprint(),
        "results": asdict(result),
    }
    print(json_line(document))
    return 0


def _print_probe(probe: Probe) -> None:
    row = _PROBE_COLUMNS.format(
        probe.concurrency,
        probe.num_requests,
        f"{probe.mean_tpot_ms:.1f}",
        f"{probe.p99_tpot_ms:.1f}",
        f"{probe.mean_ttft_ms:.1f}",
        f"{probe.output_tokens_per_s:.1f}",
        "kept" if probe.is_within_slo else "missed",
    )
    print(row, flush=True)
