"""How long does XCCL take, beside what the machine allows and beside other libraries?

Ping-pong from 8 bytes to 16 MiB, by two ranks on cores of their own and by more ranks than cores;
a2e + e2a and dispatch + combine over tokens, hidden sizes, top-k and ranks. Ceilings of the same
run: a cache line to another core and back, and memcpy. The last line of the report is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from xdeepserve import _xccl
from xdeepserve.xccl.bench_libraries import SAME_BYTES, SAME_WORK
from xdeepserve.xccl.bench_race import NEEDS, missing_peers, race
from xdeepserve.xccl.bench_rows import WORKS, Shape, grid
from xdeepserve.xccl.bench_timing import Numbers, rounds_for, timed
from xdeepserve.xccl.bench_workers import available_cores

Report = Callable[[str], None]

PARTS = ("p2p", "crowd", "rows")
P2P_SIZES = (8, 64, 512, 4096, 32768, 262144, 1 << 20, 4 << 20, 16 << 20)
CROWD_SIZES = (8, 4096, 262144)
COPY_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure.

    Attributes:
        parts: of PARTS.
        seconds: time per point.
        repeats: turns of each library at each size of a message; the middle one counts.
        sizes: bytes of point-to-point messages.
        crowd_sizes, crowds: bytes, and ranks, where all ranks play ping-pong at once; even.
        num_tokens, hidden_sizes, top_ks, num_ranks: the grid of row exchanges; ranks count the
            asking one.
        with_peers: measure other libraries too, where they can be imported.
    """

    parts: Sequence[str] = PARTS
    seconds: float = 0.2
    repeats: int = 3
    sizes: Sequence[int] = P2P_SIZES
    crowd_sizes: Sequence[int] = CROWD_SIZES
    crowds: Sequence[int] = (4, 6)
    num_tokens: Sequence[int] = (1, 32, 256)
    hidden_sizes: Sequence[int] = (576, 7168)
    top_ks: Sequence[int] = (2, 8)
    num_ranks: Sequence[int] = (2, 4, 6)
    with_peers: bool = True


FULL = BenchOptions(
    sizes=[8 << i for i in range(22)],
    crowd_sizes=[8 << 3 * i for i in range(8)],
    num_tokens=(1, 8, 32, 128, 256),
    hidden_sizes=(576, 2048, 4096, 7168),
    top_ks=(2, 4, 8),
    num_ranks=(2, 3, 4, 5, 6),
)


def run_bench(options: BenchOptions, report: Report) -> Numbers:
    """Measures everything, reports lines of text as it goes, and returns the numbers.

    Times are microseconds, `p50` and `p99`. Needs the machine for itself: ranks spin.
    """
    missing = missing_peers() if options.with_peers else dict.fromkeys(NEEDS, "left out")
    for name, reason in missing.items():
        report(f"peer {name}: {reason}")
    cores = available_cores()
    numbers: Numbers = {"cores": len(cores), "seconds_per_point": options.seconds}
    numbers["missing_peers"] = missing
    names = ["xccl", *(name for name in NEEDS if name not in missing)]
    numbers["ceilings"] = ceilings(cores, options, report)
    if "p2p" in options.parts:
        numbers["p2p"] = ping_pong(names, 2, options.sizes, options, report)
    if "crowd" in options.parts:
        numbers["crowd"] = {
            str(ranks): ping_pong(names, ranks, options.crowd_sizes, options, report)
            for ranks in options.crowds
        }
    if "rows" in options.parts:
        for work, name in WORKS.items():
            numbers[name] = rows(work, options, "openmpi" in names, report)
    report(json.dumps(numbers))
    return numbers


def ceilings(cores: list[int], options: BenchOptions, report: Report) -> Numbers:
    """What the machine allows: one cache line there and back; copying memory."""
    line_us = _xccl.cache_line_round_trip(cores[0], cores[-1]) * 1e6
    report(f"ceiling: cache line to core {cores[-1]} and back {line_us:.2f} us")
    copies = {str(size): copy_times(size) for size in options.sizes}
    return {"cache_line_round_trip_us": line_us, "memcpy_us": copies}


def copy_times(size: int) -> Numbers:
    """One memcpy through NumPy: what a message must take at least, twice per round trip."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    call = partial(np.copyto, target, source)
    return timed(call, rounds_for(call, COPY_S))


def ping_pong(
    names: Sequence[str], ranks: int, sizes: Sequence[int], options: BenchOptions, report: Report
) -> dict[str, Any]:
    """All libraries in turn, `ranks` / 2 pairs at once: {library: {size: times}}."""
    found: dict[str, Any] = {name: {} for name in names}
    report(f"ping-pong of {ranks} ranks in pairs on {len(available_cores())} cores, p50 / p99 us")
    report(table_row("bytes", names))
    contests = race(names, ranks, sizes, seconds=options.seconds, repeats=options.repeats)
    for size, times in contests:
        for name, result in times.items():
            found[name][str(size)] = result
        cells = [f"{t['p50']:.2f} / {t['p99']:.2f}" for t in times.values()]
        report(table_row(size, cells))
        if ranks > 2:
            cells = [f"{t['trips_per_s']} trips/s" for t in times.values()]
            report(table_row("in all", cells))
    return found


def table_row(head: object, cells: Iterable[str]) -> str:
    """One line of a table."""
    return f"{head!s:>9} " + " ".join(f"{cell:>22}" for cell in cells)


def rows(work: str, options: BenchOptions, with_openmpi: bool, report: Report) -> list[Numbers]:
    """Every point of the grid of row exchanges."""
    shapes = [
        Shape(tokens, hidden, top_k, ranks)
        for ranks in options.num_ranks
        for hidden in options.hidden_sizes
        for top_k in options.top_ks
        for tokens in options.num_tokens
    ]
    report(f"{WORKS[work]}, p50 / p99 us")
    heads = ["tokens x hidden, top-k", "xccl", "openmpi, same bytes", "openmpi, same work"]
    report(table_row("ranks", heads))
    found = []
    for shape, times, peer in grid(
        work, shapes, seconds=options.seconds, with_openmpi=with_openmpi
    ):
        results = (times, peer.get(SAME_BYTES), peer.get(SAME_WORK))
        cells = [f"{t['p50']:.1f} / {t['p99']:.1f}" if t else "-" for t in results]
        name = f"{shape.tokens} x {shape.hidden}, {shape.top_k}"
        report(table_row(shape.ranks, [name, *cells]))
        found.append({**_fields(shape), **times, "openmpi": peer})
    return found


def _fields(shape: Shape) -> Numbers:
    return {
        "tokens": shape.tokens,
        "hidden": shape.hidden,
        "top_k": shape.top_k,
        "ranks": shape.ranks,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--seconds", type=float, default=0.2, help="time per point")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each library and size")
    parser.add_argument("--part", choices=PARTS, action="append", help="this part; all by default")
    parser.add_argument("--full", action="store_true", help="the whole grid, not its corners")
    parser.add_argument("--no-peers", action="store_true", help="leave other libraries out")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    options = replace(
        FULL if arguments.full else BenchOptions(),
        parts=arguments.part or PARTS,
        seconds=arguments.seconds,
        repeats=arguments.repeats,
        with_peers=not arguments.no_peers,
    )
    run_bench(options, _write)
    return 0


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """`python -m xdeepserve.xccl.bench`."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
