"""`xdeepserve xccl`: measure the communication library on this machine."""

from __future__ import annotations

import argparse

from xdeepserve.xccl import bench


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    measure = verbs.add_parser("bench", help="latency of every primitive beside its ceiling")
    bench.add_arguments(measure)
    measure.set_defaults(handler=bench.run)
