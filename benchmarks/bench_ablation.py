"""What is each part of the engine worth? From a plain engine to the whole one, a step at a time.

Every step is the one before it and one more thing. Each is measured in turn, `--repeats` times:
random prompts, greedy answers of fixed length, as many at a time as keep the mean TPOT within the
SLO. How many that is, is found in the first repeat; an engine that does not batch has one. Reported
are the medians of output tokens per second and of TPOT, and the ratio to the first step. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

from xdeepserve import _native, envs, store
from xdeepserve.config import EngineConfig, ModelConfig
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.launch.compose import load_model_at
from xdeepserve.launch.offline import run_batch
from xdeepserve.loadgen.report import json_line, machine_fingerprint
from xdeepserve.ops.machine import measure_ceilings

LADDER: Final = (64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
"""Batches that are tried, largest first."""


@dataclass(frozen=True, slots=True)
class Step:
    """One engine.

    Attributes:
        adds: what it has that the one before has not.
        isa: kernels; "" where the backend has none of its own.
        threads: of the operators; NumPy's matrix products use all cores.
        batches: whether it computes several requests at once.
    """

    adds: str
    dtype: str
    isa: str
    threads: int
    kv_cache_dtype: str = "auto"
    batches: bool = False
    backend: str = "cpu"

    def build(self, folder: Path, num_seqs: int) -> DPGroup:
        """The engine, stepped by hand."""
        config = ModelConfig(
            dtype=self.dtype,
            kv_cache_dtype=self.kv_cache_dtype,
            backend=self.backend,
            num_threads=self.threads,
        )
        with envs.ISA.override(self.isa or "auto"):
            model = load_model_at(folder, config)
        engine = EngineConfig(max_num_seqs=num_seqs if self.batches else 1, prefix_caching=False)
        return build_dp_group(model=model, model_name=folder.name, config=engine)


def steps(isas: Sequence[str], threads: int) -> list[Step]:
    """Those that a machine with these instruction sets and threads has."""
    best = isas[-1]
    found = [
        Step("plain: NumPy, one request at a time", "float32", "", 1, backend="reference"),
        Step("compiled operators, plain C++", "float32", isas[0], 1),
    ]
    wide = [isa for isa in isas[1:] if isa != "amx"]
    found += [Step(f"vectors: {isa}", "float32", isa, 1) for isa in wide]
    found.append(Step("bf16 weights and cache", "bf16", wide[-1] if wide else isas[0], 1))
    if best == "amx":
        found.append(Step("tile registers: amx", "bf16", best, 1))
    if threads > 1:
        found.append(Step(f"{threads} threads", "bf16", best, threads))
    found.append(Step("continuous batching", "bf16", best, threads, batches=True))
    found.append(Step("int8 weights", "int8", best, threads, batches=True))
    found.append(Step("int8 KV cache", "int8", best, threads, "int8", batches=True))
    return found


@dataclass(frozen=True, slots=True)
class Run:
    """One batch from its arrival to its last token."""

    tokens_per_s: float
    tpot_ms: float


@dataclass(slots=True)
class Result:
    """Of one step: a rate and a mean TPOT per repeat.

    Attributes:
        batch: requests at a time.
    """

    step: Step
    batch: int = 1
    tokens_per_s: list[float] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)

    def add(self, run: Run) -> None:
        self.tokens_per_s.append(run.tokens_per_s)
        self.tpot_ms.append(run.tpot_ms)


def run_once(group: DPGroup, batch: int, args: argparse.Namespace, salt: str) -> Run:
    """A batch of requests that are all there at the start."""
    seconds, timelines = run_batch(
        group, batch=batch, input_len=args.input_len, output_len=args.output_len, salt=salt
    )
    tpots = [timeline.tpot_s or 0.0 for timeline in timelines]
    return Run(batch * args.output_len / seconds, 1e3 * fmean(tpots))


def find_batch(measure: Callable[[int], Run], slo_ms: float, most: int) -> int:
    """The batch of the ladder with the highest rate within the SLO; 1 if there is none."""
    rates = {}
    for batch in (size for size in LADDER if size <= most):
        run = measure(batch)
        if run.tpot_ms <= slo_ms:
            rates[batch] = run.tokens_per_s
            if len(rates) == 2:  # smaller ones are slower still
                break
    return max(rates, key=lambda batch: rates[batch], default=1)


def measure_all(found: list[Step], folder: Path, args: argparse.Namespace) -> list[Result]:
    """Every step in every repeat, in turn."""
    results = [Result(step) for step in found]
    groups = [step.build(folder, LADDER[0]) for step in found]
    for result, group in zip(results, groups, strict=True):
        most = LADDER[0] if result.step.batches else 1
        result.batch = find_batch(
            lambda batch, group=group: run_once(group, batch, args, f"find {batch}"),
            args.slo_ms,
            most,
        )
        print(f"{result.step.adds}: {result.batch} at a time", flush=True)
    for repeat in range(args.repeats):
        for result, group in zip(results, groups, strict=True):
            result.add(run_once(group, result.batch, args, str(repeat)))
    return results


def table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A record per step; its ratios are medians over the repeats."""
    rows, first = [], results[0].tokens_per_s
    for idx, result in enumerate(results):
        before = results[max(0, idx - 1)].tokens_per_s
        rates = result.tokens_per_s
        rows.append(
            asdict(result.step)
            | {
                "batch": result.batch,
                "tokens_per_s": median(rates),
                "tpot_ms": median(result.tpot_ms),
                "ratio_to_step_before": _ratio(rates, before),
                "ratio": _ratio(rates, first),
            }
        )
    return rows


def _ratio(rates: list[float], base: list[float]) -> float:
    return median(rate / other for rate, other in zip(rates, base, strict=True))


def print_table(rows: Sequence[dict[str, Any]], slo_ms: float) -> None:
    """Markdown."""
    print("\n| step | batch | output tok/s | TPOT ms | x before | x plain |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        missed = ", above the SLO" if row["tpot_ms"] > slo_ms else ""
        values = [row["adds"], str(row["batch"]), f"{row['tokens_per_s']:.1f}"]
        values += [f"{row['tpot_ms']:.1f}{missed}", f"{row['ratio_to_step_before']:.2f}"]
        print("| " + " | ".join([*values, f"{row['ratio']:.1f}"]) + " |")


def plot(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """A bar per step; False when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 0.6 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh([row["adds"] for row in rows], [row["tokens_per_s"] for row in rows])
    axes.bar_label(bars, [f"{row['tokens_per_s']:.0f}" for row in rows], padding=3)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("output tokens per second within the TPOT SLO")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="name or folder")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each step (default: 5)")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--slo-ms", type=float, default=50.0, help="mean TPOT (default: 50)")
    parser.add_argument("--threads", type=int, default=0, help="0 = one per core")
    parser.add_argument("--plot", type=Path, help="where to write a picture")
    args = parser.parse_args(arguments)
    if min(args.repeats, args.input_len, args.output_len - 1) < 1 or args.slo_ms <= 0:
        parser.error("--repeats, --input-len, --slo-ms must be positive, --output-len at least 2")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and the JSON line."""
    args = parse(arguments)
    ceilings = measure_ceilings(args.threads)
    found = steps(_native.available_isas(), ceilings.threads)
    rows = table(measure_all(found, store.resolve(args.model), args))
    print_table(rows, args.slo_ms)
    if args.plot and not plot(rows, args.plot):
        print(f"no plot: pip install matplotlib to write {args.plot}")
    document = {
        "benchmark": "ablation",
        "config": {name: str(value) for name, value in vars(args).items()},
        "steps": rows,
        "ceilings": asdict(ceilings),
        "machine": machine_fingerprint(),
    }
    print(json_line(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
