"""Runs every `bench_*.py` beside it in turn, with its defaults, and gathers their JSON lines.

A benchmark is a program whose last line on stdout is one JSON document; here the lines before it
pass through. The last line of this program is one document with all of theirs. Exit status 1 when
one of them failed or printed none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from xdeepserve.loadgen.report import json_line, machine_fingerprint

FOLDER = Path(__file__).resolve().parent


def last_json(stdout: str) -> dict[str, Any] | None:
    """The JSON object on the last non-empty line, or None when there is none."""
    lines = stdout.strip().splitlines()
    try:
        document = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def run_one(path: Path, timeout_s: float) -> dict[str, Any] | None:
    """Run one benchmark; its document, or None with the reason printed."""
    print(f"=== {path.stem}", flush=True)
    try:
        done = subprocess.run(
            [sys.executable, str(path)], stdout=subprocess.PIPE, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        print(f"{path.stem}: not finished after {timeout_s:g} s")
        return None
    print(done.stdout, end="", flush=True)
    if done.returncode != 0:
        print(f"{path.stem}: exit status {done.returncode}")
        return None
    document = last_json(done.stdout)
    if document is None:
        print(f"{path.stem}: its last line is not a JSON object")
    return document


def main(folder: Path = FOLDER, arguments: list[str] | None = None) -> int:
    """Run the benchmarks of `folder`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="e.g. start serving (default: all)")
    parser.add_argument("--timeout-s", type=float, default=3600.0, help="for each benchmark")
    args = parser.parse_args(arguments)
    paths = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    unknown = [name for name in args.names if name not in paths]
    if unknown:
        parser.error(f"no benchmark named {unknown[0]!r}; there are {', '.join(paths)}")
    names = args.names or list(paths)
    results = {name: run_one(paths[name], args.timeout_s) for name in names}
    print(json_line({"benchmark": "all", "machine": machine_fingerprint(), "results": results}))
    return 1 if None in results.values() else 0


if __name__ == "__main__":
    sys.exit(main())
