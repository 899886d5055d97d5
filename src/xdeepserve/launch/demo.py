"""`xdeepserve demo`: start a server, ask one question with streaming, print the answer, stop."""

from __future__ import annotations

import argparse

from xdeepserve.config import ModelConfig
from xdeepserve.launch.flags import add_config_flags, config_from_args
from xdeepserve.launch.server_process import ServerProcess
from xdeepserve.loadgen.chat import ask_once

QUESTION = "What is the capital of France?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a name, a folder or a .gguf file")
    parser.add_argument("--question", default=QUESTION, help="what to ask (default: %(default)s)")
    add_config_flags(parser, ModelConfig, only=["dtype"])
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Ask once; 0 when an answer came and the server stopped cleanly."""
    dtype = config_from_args(ModelConfig, args).dtype
    server = ServerProcess(args.model, "--dtype", dtype, show_stderr=True)
    try:
        print(f"{server.model} on {server.url}\n> {args.question}", flush=True)
        options = {"temperature": 0, "max_tokens": 128}
        answer = ask_once(server.url, server.model, args.question, options=options)
    finally:
        code = server.stop()
    return 0 if answer.text and code == 0 else 1
