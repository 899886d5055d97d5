"""`xdeepserve bench`: measure a server from outside (serve) or the engine alone (offline)."""

from __future__ import annotations

import argparse

from xdeepserve.loadgen.cli import add_bench_serve_arguments, run_bench_serve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    serve = kinds.add_parser("serve", help="load test of any OpenAI-compatible server")
    add_bench_serve_arguments(serve)
    serve.set_defaults(handler=run_bench_serve)
    offline = kinds.add_parser("offline", help="throughput of the engine alone, without HTTP")
    _add_offline_arguments(offline)


def _add_offline_arguments(parser: argparse.ArgumentParser) -> None:
    from xdeepserve.launch import offline

    offline.add_arguments(parser)
