"""How fast is every operator, beside torch and beside what this machine can do?

Every operator of `Ops` over the shapes of the four compared models: steps that decode 1 to 64
sequences and that prefill 512 tokens, contexts of 256 and 4,096, each weight precision. A case
prints its time from Python (median of interleaved turns), its rate, the share of the bound that its
bytes and operations set, and torch's time. Weights and caches are copied until no cache holds them
and take turns, so a call reads them from memory; activations stay in a cache, as in a step. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `benchmarks`, as a program

from benchmarks.operators.case import TINY_SIZES, Sizes
from benchmarks.operators.measure import Result, Timing, measure
from benchmarks.operators.models import spec_of, toy_spec_of
from benchmarks.operators.operands import Operands
from benchmarks.operators.registry import CASES, WITHOUT_TORCH, cases_of
from benchmarks.operators.roofline import Roof, measure_roof, memory_footprint
from benchmarks.operators.torch_operands import TorchOperands, import_torch
from benchmarks.peers.foreign_load import MAX_FOREIGN_SHARE, watched
from benchmarks.peers.models import MODELS

from xdeepserve.loadgen.report import json_line, machine_fingerprint
from xdeepserve.ops.cpu import CpuOps

QUICK_FOOTPRINT: Final = 1 << 20
QUICK: Final = Timing(repeats=2, turn_s=1e-4, pause_s=0.0)
MIB: Final = 1 << 20

HEADER: Final = (
    f"{'operator':<16}{'what':<15}{'dtype':<8}{'rows':>5}{'context':>8}{'us':>11}{'rate':>9}"
    f"{'':<9}{'share':>6} {'of':<8}{'torch us':>11}{'ratio':>7}  by"
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The flags; names are checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--operators", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=Timing().repeats, help="turns of each side")
    parser.add_argument("--threads", type=int, default=0, help="0 = one per core")
    parser.add_argument("--no-torch", action="store_true", help="leave its column empty")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models in a few seconds; numbers mean nothing"
    )
    args = parser.parse_args(arguments)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} must be at least 1")
    return args


def measure_model(
    model: str,
    operands: Operands,
    torch: TorchOperands | None,
    roof: Roof,
    args: argparse.Namespace,
) -> list[Result]:
    """Every case of one model, printed as it is measured."""
    spec = toy_spec_of(model) if args.quick else spec_of(model)
    sizes, timing = (TINY_SIZES, QUICK) if args.quick else (Sizes(), Timing(args.repeats))
    print(f"\n{model}\n{HEADER}")
    results = []
    for case in cases_of(spec, sizes, args.operators):
        results.append(measure(model, case, operands, torch, roof, timing))
        print(row(results[-1]), flush=True)
    return results


def row(result: Result) -> str:
    """One line of the table."""
    unit = "GFLOP/s" if result.bound == "compute" else "GB/s"
    line = f"{result.operator:<16}{result.what:<15}{result.dtype:<8}"
    line += f"{_number(result.tokens):>5}{_number(result.context):>8}"
    line += f"{result.us:>11.1f}{result.rate:>9.1f} {unit:<8}{result.share:>6.0%} {result.bound:<8}"
    if result.torch.us is None or result.ratio is None:
        return f"{line}{'-':>11}{'-':>7}  {result.torch.reason}"
    return f"{line}{result.torch.us:>11.1f}{result.ratio:>7.2f}  {result.torch.way}"


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def summaries(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Medians and extremes by operator, precision and bound."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.operator, result.dtype, result.bound), []).append(result)
    return [_summary(key, found) for key, found in groups.items()]


def _summary(key: tuple[str, str, str], found: list[Result]) -> dict[str, Any]:
    operator, dtype, bound = key
    ratios = [result.ratio for result in found if result.ratio is not None]
    return {
        "operator": operator,
        "dtype": dtype,
        "bound": bound,
        "cases": len(found),
        "share": median(result.share for result in found),
        "share_worst": min(result.share for result in found),
        "ratio": median(ratios) if ratios else None,
        "ratio_worst": min(ratios) if ratios else None,
    }


def print_summaries(found: list[dict[str, Any]]) -> None:
    """The table of them."""
    print(f"\n{'all models':<16}{'dtype':<9}{'bound':<9}{'cases':>5}", end="")
    print(f"{'share':>7}{'worst':>7}{'ratio':>8}{'worst':>7}")
    for one in found:
        line = f"{one['operator']:<16}{one['dtype']:<9}{one['bound']:<9}{one['cases']:>5}"
        line += f"{one['share']:>7.0%}{one['share_worst']:>7.0%}"
        if one["ratio"] is not None:
            line += f"{one['ratio']:>8.2f}{one['ratio_worst']:>7.2f}"
        print(line)


def print_roof(roof: Roof, footprint: int) -> None:
    """What the shares are shares of."""
    peaks = ", ".join(f"{dtype} {peak:.0f}" for dtype, peak in roof.gemm_gflop_per_s.items())
    print(
        f"ceilings, {roof.threads} threads, {roof.isa}: memory {roof.memory_gb_per_s:.1f} GB/s "
        f"over {footprint // MIB} MiB, cache {roof.cache_gb_per_s:.0f} GB/s, GEMM {peaks} GFLOP/s; "
        f"an empty call takes {roof.call_us:.1f} us",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables and the JSON line."""
    args = parse(arguments)
    ops = CpuOps(num_threads=args.threads)
    footprint = QUICK_FOOTPRINT if args.quick else memory_footprint()
    module, about_torch = (None, "--no-torch") if args.no_torch else import_torch()
    torch = TorchOperands(module, footprint, ops.num_threads) if module else None
    print(about_torch if module else f"no torch: {about_torch}")
    operands = Operands(ops, footprint)
    results: list[Result] = []
    roofs: dict[str, Roof] = {}
    foreign: dict[str, float] = {}
    for model in args.models:
        # a quick run has no numbers to hold against those of a moment later
        reused = next(iter(roofs.values()), None) if args.quick else None
        roofs[model] = reused or measure_roof(ops, footprint)
        print_roof(roofs[model], footprint)
        run = partial(measure_model, model, operands, torch, roofs[model], args)
        found, foreign[model] = watched(os.getpid(), run)
        results += found
        if foreign[model] > MAX_FOREIGN_SHARE:
            print(f"note: other programs used {foreign[model]:.0%} of the machine meanwhile")
    summary = summaries(results)
    print_summaries(summary)
    document = {
        "benchmark": "ops",
        "config": vars(args),
        "machine": machine_fingerprint(),
        "torch": about_torch,
        "without_torch": WITHOUT_TORCH,
        "footprint_bytes": footprint,
        "ceilings": {model: asdict(roof) for model, roof in roofs.items()},
        "foreign_share": foreign,
        "summary": summary,
        "results": [asdict(result) for result in results],
    }
    print(json_line(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
