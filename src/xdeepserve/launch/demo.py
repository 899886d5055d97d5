"""`xdeepserve demo`: start a server, ask one question with streaming, print the answer, stop."""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import threading

from xdeepserve.errors import EngineDeadError
from xdeepserve.launch.compose import add_model_arguments
from xdeepserve.loadgen.chat import ask_once

QUESTION = "What is the capital of France?"
READY = re.compile(r"xdeepserve: serving (\S+) on (http://\S+)")
STOP_TIMEOUT_S = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--question", default=QUESTION, help="what to ask (default: %(default)s)")
    parser.add_argument(
        "--start-timeout-s", type=float, default=900.0, help="for download, packing and start"
    )
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Ask once; 0 when an answer came and the server stopped cleanly."""
    command = [sys.executable, "-m", "xdeepserve.launch.cli", "serve", args.model, "--port", "0"]
    command += ["--dtype", args.dtype]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        name, url = _wait_until_ready(server, args.start_timeout_s)
        print(f"{name} on {url}\n> {args.question}")
        answer = ask_once(url, name, args.question, options={"temperature": 0, "max_tokens": 128})
    finally:
        server.send_signal(signal.SIGTERM)
        code = _wait(server)
    return 0 if answer.text and code == 0 else 1


def _wait_until_ready(server: subprocess.Popen[str], timeout_s: float) -> tuple[str, str]:
    """Model name and URL from the server's own line; its other lines are passed on."""
    assert server.stdout is not None, "stdout is a pipe"
    watchdog = threading.Timer(timeout_s, server.kill)
    watchdog.start()
    try:
        for line in server.stdout:
            found = READY.search(line)
            if found:
                return found.group(1), found.group(2)
            sys.stdout.write(line)
    finally:
        watchdog.cancel()
    raise EngineDeadError(f"the server did not start (exit code {_wait(server)}); see its messages")


def _wait(server: subprocess.Popen[str]) -> int:
    try:
        return server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait(STOP_TIMEOUT_S)
