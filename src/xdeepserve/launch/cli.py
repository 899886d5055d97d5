"""`xdeepserve` (short `xds`): parse flags, run one command, turn typed errors into exit codes.

Exit codes: 0 done, 1 the work failed, 2 wrong flags, files or environment, 130 interrupted.
Command modules are imported only when their command runs, so `--help` stays fast.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from xdeepserve import __version__
from xdeepserve.errors import ConfigError, XDeepServeError

COMMANDS: dict[str, str] = {
    "serve": "serve a model behind an OpenAI-compatible API",
    "status": "show the workers of a running service",
    "scale": "change the number of workers of a running service",
    "rebalance": "move the experts of a running service to where their load wants them",
    "admin": "tenants, their projects and API keys",
    "usage": "what was used and what it cost, as a table, CSV or JSON",
    "chat": "talk to a running server in the terminal",
    "generate": "complete one prompt in this process and print it",
    "models": "list, inspect, pull and upcycle models",
    "bench": "measure a server (serve) or the engine alone (offline)",
    "xccl": "measure the communication library (bench), look at its transfers (trace)",
    "demo": "start a server, ask one question with streaming, stop",
    "doctor": "what this machine can do, which instruction set is used, leftovers",
}

Handler = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(arguments)
        handler: Handler = args.handler
        return handler(args)
    except ConfigError as exc:
        return _fail(exc.message, 2)
    except XDeepServeError as exc:
        return _fail(exc.message, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our stdout went away (`xds models list | head`): nothing left to say.
        sys.stderr.close()
        return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Parse with the flags of the named command alone, so that others need not be imported."""
    parser = argparse.ArgumentParser(prog="xdeepserve", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=f"xdeepserve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    named = next((word for word in arguments if word in COMMANDS), None)
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        if name == named:
            import_module(f"xdeepserve.launch.{name}").add_arguments(sub)
    return parser.parse_args(arguments)


def _fail(message: str, code: int) -> int:
    print(f"xdeepserve: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
