"""`xdeepserve bench`: measure a server (serve), the engine alone (offline) or its steps (step)."""

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
    step = kinds.add_parser("step", help="where each microsecond of a decode step goes")
    _add_step_arguments(step)


def _add_offline_arguments(parser: argparse.ArgumentParser) -> None:
    from xdeepserve.launch import offline

    offline.add_arguments(parser)


def _add_step_arguments(parser: argparse.ArgumentParser) -> None:
    from xdeepserve.launch import bench_step

    bench_step.add_arguments(parser)
