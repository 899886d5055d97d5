"""`xdeepserve chat`: talk to a running server in the terminal."""

from __future__ import annotations

import argparse

from xdeepserve.loadgen.cli import add_chat_arguments, run_chat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_chat_arguments(parser)
    parser.set_defaults(handler=run_chat)
