"""How big is the base install, and how long from the command to the first token?

Size: a fresh virtual environment with the project and no extras; bytes of its site-packages.
Start: from spawning `xdeepserve serve MODEL` to the first token of one completion request, with an
empty cache of packed weights (cold) and with a filled one (warm); medians of `--repeats` pairs
after one unmeasured start, which also downloads the model where it is missing. "Cold" is about the
packed weights: the operating system's page cache is warm in both. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xdeepserve import envs
from xdeepserve.launch.server_process import ServerProcess
from xdeepserve.loadgen.http_client import HttpClient
from xdeepserve.loadgen.report import json_line, machine_fingerprint
from xdeepserve.loadgen.runner import RequestSender
from xdeepserve.loadgen.workload import LengthDistribution, Workload, WorkloadConfig

ROOT = Path(__file__).resolve().parent.parent
INSTALL_TIMEOUT_S = 1200.0
NUM_LARGEST = 10
MIB = 2**20


@dataclass(frozen=True)
class StartTimes:
    """One start: seconds from spawn to ready, and to the first token."""

    ready_s: float
    first_token_s: float


def installed_sizes(site_packages: Path) -> Counter[str]:
    """Bytes per top-level entry of a site-packages folder; links are not followed."""
    sizes: Counter[str] = Counter()
    for path in site_packages.rglob("*"):
        if path.is_file() and not path.is_symlink():
            sizes[path.relative_to(site_packages).parts[0]] += path.stat().st_size
    return sizes


def measure_install() -> dict[str, Any]:
    """Install the project without extras into a temporary environment and measure it."""
    with tempfile.TemporaryDirectory(prefix="xdeepserve-bench-") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        (site_packages,) = Path(folder, "lib").glob("python*/site-packages")
        before = installed_sizes(site_packages)
        started = time.monotonic()
        subprocess.run(
            [python, "-m", "pip", "install", "-q", str(ROOT)],
            check=True,
            timeout=INSTALL_TIMEOUT_S,
            stdout=sys.stderr,
        )
        seconds = time.monotonic() - started
        sizes = installed_sizes(site_packages) - before
    largest = {name: round(size / MIB, 2) for name, size in sizes.most_common(NUM_LARGEST)}
    print(f"base install: {sizes.total() / MIB:.1f} MiB in {seconds:.0f} s, largest entries:")
    for name, mib in largest.items():
        print(f"{mib:>10.2f} MiB  {name}")
    return {"total_mib": round(sizes.total() / MIB, 1), "seconds": seconds, "largest_mib": largest}


async def _first_token_at(url: str, model: str) -> float:
    """Monotonic time of the first token of one short completion."""
    config = WorkloadConfig(
        input_len=LengthDistribution("fixed", 8), output_len=LengthDistribution("fixed", 2)
    )
    request = next(Workload(config, model).requests())
    async with HttpClient(url) as client:
        record = await RequestSender(client).send(request, time.monotonic())
    if record.error is not None or record.timeline.first_token_s is None:
        raise RuntimeError(f"the request failed: {record.error}")
    return record.timeline.first_token_s


def measure_start(arguments: list[str], home: Path) -> StartTimes:
    """Start a server with `home` as its cache, ask for a token, stop it."""
    started = time.monotonic()
    with ServerProcess(*arguments, env={envs.HOME.name: str(home)}) as server:
        ready = time.monotonic()
        first_token = asyncio.run(_first_token_at(server.url, server.model))
    return StartTimes(ready - started, first_token - started)


def home_without_packed(real: Path, copy: Path) -> None:
    """Fill `copy` with links to everything in `real` but the packed weights."""
    for entry in real.iterdir():
        if entry.name != "packed":
            (copy / entry.name).symlink_to(entry)


def measure_starts(arguments: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """Medians of cold and warm starts, measured in pairs."""
    home = envs.HOME.get()
    measure_start(arguments, home)
    times: dict[str, list[StartTimes]] = {"cold": [], "warm": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="xdeepserve-bench-") as folder:
            home_without_packed(home, Path(folder))
            for kind in ("cold", "warm"):
                times[kind].append(measure_start(arguments, Path(folder)))
    medians = {}
    for kind, starts in times.items():
        ready_s = statistics.median(start.ready_s for start in starts)
        first_token_s = statistics.median(start.first_token_s for start in starts)
        medians[kind] = {"ready_s": ready_s, "first_token_s": first_token_s}
        print(f"{kind} start: ready {ready_s:.2f} s, first token {first_token_s:.2f} s")
    return medians


def main() -> int:
    """Measure what the flags ask for and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m-moe8", help="name or folder")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--repeats", type=int, default=3, help="cold and warm pairs (default: 3)")
    parser.add_argument("--skip-size", action="store_true", help="do not measure the install")
    parser.add_argument("--skip-start", action="store_true", help="do not start servers")
    args = parser.parse_args()
    model = str(Path(args.model).resolve()) if os.sep in args.model else args.model
    document = {
        "benchmark": "start",
        "config": {"model": args.model, "dtype": args.dtype, "repeats": args.repeats},
        "machine": machine_fingerprint(),
        "install": None if args.skip_size else measure_install(),
        "start": None
        if args.skip_start
        else measure_starts([model, "--dtype", args.dtype], args.repeats),
    }
    print(json_line(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
