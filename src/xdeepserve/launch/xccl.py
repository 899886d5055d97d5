"""`xdeepserve xccl`: measure the communication library, and look at what a run sends."""

from __future__ import annotations

import argparse

from xdeepserve.launch import xccl_trace
from xdeepserve.xccl import bench


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    measure = verbs.add_parser("bench", help="latency of every primitive beside its ceiling")
    bench.add_arguments(measure)
    measure.set_defaults(handler=bench.run)
    look = verbs.add_parser("trace", help="the latest transfers of a running service")
    xccl_trace.add_arguments(look)
