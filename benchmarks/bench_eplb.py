"""How even do the experts get, how fast is the plan, and how many experts must move?

Traces of expert load (uniform, zipf, one expert at 30x the mean) on several layouts: peak/mean load
of the ranks for experts in plain order, for the published EPLB algorithm, for `place_experts`, and
a lower bound that no placement can beat; milliseconds per layer. Then a load that shifts from
window to window: each placement is judged on the window after the one it was made for, with the
experts that ranks have to load per layer. Synthetic and seeded. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xdeepserve.eplb import (
    ExpertPlacement,
    Phase,
    lower_bound,
    migrate,
    num_loads,
    peak_over_mean,
    place_experts,
    rebalance_experts,
    resize,
)
from xdeepserve.loadgen.report import json_line, machine_fingerprint

Load = NDArray[np.float64]
TOKENS_PER_EXPERT = 1000
HOTTEST_TIMES_MEAN = 30
PLACE_REPEATS = 3
DRIFT = 0.3
"""Sigma of the lognormal factor on each expert's load from one window to the next."""


@dataclass(frozen=True)
class Layout:
    """One service: numbers as in `place_experts`."""

    num_experts: int
    num_replicas: int
    num_ranks: int
    num_groups: int = 1
    num_nodes: int = 1

    def __str__(self) -> str:
        text = f"{self.num_experts} -> {self.num_replicas} on {self.num_ranks}"
        if self.num_nodes > 1:
            text += f", {self.num_groups} groups on {self.num_nodes} nodes"
        return text

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `place_experts`."""
        arguments = asdict(self)
        del arguments["num_experts"]
        return arguments


LAYOUTS = (
    Layout(256, 288, 288),
    Layout(256, 288, 144),
    Layout(256, 288, 96),
    Layout(256, 288, 32),
    Layout(256, 288, 32, num_groups=8, num_nodes=4),
    Layout(64, 72, 8),
    Layout(64, 64, 4),
    Layout(8, 12, 4),
    Layout(8, 8, 2),
)


def uniform(rng: np.random.Generator, num_layers: int, num_experts: int) -> Load:
    """Every expert equally likely; what is left is chance."""
    return rng.poisson(TOKENS_PER_EXPERT, (num_layers, num_experts)).astype(np.float64)


def zipf(rng: np.random.Generator, num_layers: int, num_experts: int) -> Load:
    """The n-th expert gets 1 / n ** 0.8, in another order in each layer."""
    weight = 1 / np.arange(1, num_experts + 1) ** 0.8
    weight *= TOKENS_PER_EXPERT / weight.mean()
    return np.floor([rng.permutation(weight) for _ in range(num_layers)])


def hottest(rng: np.random.Generator, num_layers: int, num_experts: int) -> Load:
    """Lognormal, and one expert with 30 times the mean (or 80% of all, with fewer experts)."""
    load = rng.lognormal(0, 0.6, (num_layers, num_experts)) * TOKENS_PER_EXPERT
    layers, hot = np.arange(num_layers), rng.integers(0, num_experts, num_layers)
    load[layers, hot] = 0
    share = min(HOTTEST_TIMES_MEAN / num_experts, 0.8)
    load[layers, hot] = load.sum(axis=1) * share / (1 - share)
    return np.floor(load)


TRACES: dict[str, Callable[[np.random.Generator, int, int], Load]] = {
    "uniform": uniform,
    "zipf": zipf,
    "hottest 30x": hottest,
}


@dataclass(frozen=True)
class StaticResult:
    """Mean over the layers of peak/mean, and milliseconds per layer (median of repeats)."""

    layout: str
    trace: str
    plain: float
    published: float
    ours: float
    bound: float
    layers_better: int
    layers_worse: int
    published_ms: float
    ours_ms: float


def timed(call: Callable[[], ExpertPlacement], num_layers: int) -> tuple[ExpertPlacement, float]:
    """The result and milliseconds per layer."""
    times = []
    for _ in range(PLACE_REPEATS):
        started = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - started)
    return result, statistics.median(times) * 1e3 / num_layers


def plain_order(layout: Layout, num_layers: int) -> ExpertPlacement:
    """Experts in order, spare slots empty: before any balancing."""
    plain = ExpertPlacement.contiguous(
        num_layers=num_layers, num_experts=layout.num_experts, num_ranks=layout.num_ranks
    )
    slots = -(-layout.num_replicas // layout.num_ranks)
    return resize(plain, num_ranks=layout.num_ranks, slots_per_rank=slots)


def published_placement(load: Load, layout: Layout) -> ExpertPlacement:
    """What the published algorithm makes of the load."""
    return rebalance_experts(
        load, layout.num_replicas, layout.num_groups, layout.num_nodes, layout.num_ranks
    )


def measure(layout: Layout, trace: str, num_layers: int, seed: int) -> StaticResult:
    """Both algorithms on one load."""
    load = TRACES[trace](np.random.default_rng(seed), num_layers, layout.num_experts)
    numbers = layout.arguments()
    published, published_ms = timed(lambda: published_placement(load, layout), num_layers)
    ours, ours_ms = timed(lambda: place_experts(load, **numbers), num_layers)
    theirs, mine = peak_over_mean(load, published), peak_over_mean(load, ours)
    bound = lower_bound(load, **numbers) * layout.num_ranks / load.sum(axis=1)
    return StaticResult(
        layout=str(layout),
        trace=trace,
        plain=float(peak_over_mean(load, plain_order(layout, num_layers)).mean()),
        published=float(theirs.mean()),
        ours=float(mine.mean()),
        bound=float(bound.mean()),
        layers_better=int((mine < theirs * (1 - 1e-9)).sum()),
        layers_worse=int((mine > theirs * (1 + 1e-9)).sum()),
        published_ms=published_ms,
        ours_ms=ours_ms,
    )


def shifting_loads(layout: Layout, num_layers: int, num_windows: int, seed: int) -> Iterator[Load]:
    """Loads that drift; halfway the hottest expert becomes another one."""
    rng = np.random.default_rng(seed)
    load = hottest(rng, num_layers, layout.num_experts)
    for window in range(num_windows):
        if window == num_windows // 2:
            load = hottest(rng, num_layers, layout.num_experts)
        yield np.floor(load)
        load = load * rng.lognormal(0, DRIFT, load.shape)


def follow(
    loads: list[Load], place: Callable[[Load, ExpertPlacement], ExpertPlacement], layout: Layout
) -> dict[str, float]:
    """Rebalance after each window; judged on the next one, from the second on."""
    placement = plain_order(layout, loads[0].shape[0])
    placement = place(loads[0], placement)
    ratios, num_loaded = [], 0
    for load in loads[1:]:
        ratios.append(float(peak_over_mean(load, placement).mean()))
        following = place(load, placement)
        num_loaded += num_loads(placement, following)
        placement = following
    per_layer = num_loaded / (len(ratios) * loads[0].shape[0])
    return {"peak_over_mean": statistics.mean(ratios), "loads_per_layer": per_layer}


def measure_shifting(
    layout: Layout, num_layers: int, num_windows: int, seed: int
) -> dict[str, Any]:
    """Published and ours over the same shifting load."""
    loads = list(shifting_loads(layout, num_layers, num_windows, seed))
    first = published_placement(loads[0], layout)
    numbers = layout.arguments()
    return {
        "layout": str(layout),
        "never rebalanced": follow(loads, lambda _, current: first, layout),
        "published": follow(loads, lambda load, _: published_placement(load, layout), layout),
        "ours": follow(
            loads, lambda load, current: place_experts(load, current=current, **numbers), layout
        ),
    }


def measure_migration(layout: Layout, num_layers: int, seed: int) -> dict[str, float]:
    """Planning time of the ticks of one migration between two unrelated loads."""
    rng = np.random.default_rng(seed)
    numbers = layout.arguments()
    current = place_experts(hottest(rng, num_layers, layout.num_experts), **numbers)
    target = place_experts(hottest(rng, num_layers, layout.num_experts), current=current, **numbers)
    times, num_flips, num_loaded = [], 0, 0
    ticks = migrate(current, target)
    while True:
        started = time.perf_counter()
        tick = next(ticks, None)
        times.append((time.perf_counter() - started) * 1e3)
        if tick is None:
            break
        num_flips += tick.phase is Phase.FLIP
        num_loaded += len(tick.moves) if tick.phase is Phase.LOAD else 0
    return {
        "num_epochs": num_flips,
        "num_loads": num_loaded,
        "fewest_loads": num_loads(current, target),
        "tick_ms_median": statistics.median(times),
        "tick_ms_max": max(times),
    }


def print_static(results: list[StaticResult]) -> None:
    """The table of peak/mean."""
    print(f"{'experts -> replicas on ranks':<38}{'trace':<13}plain publ.  ours   bound  ms/layer")
    for r in results:
        print(
            f"{r.layout:<38}{r.trace:<12}{r.plain:6.2f} {r.published:6.3f} {r.ours:6.3f} "
            f"{r.bound:6.3f}  {r.published_ms:.2f} {r.ours_ms:.2f}"
        )


def main() -> int:
    """Measure, print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=61, help="layers of each model")
    parser.add_argument("--windows", type=int, default=10, help="windows of the shifting load")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    static = [
        measure(layout, trace, args.layers, args.seed) for layout in LAYOUTS for trace in TRACES
    ]
    print_static(static)
    shifting = [
        measure_shifting(layout, args.layers, args.windows, args.seed)
        for layout in (Layout(256, 288, 32), Layout(64, 72, 8))
    ]
    for result in shifting:
        print(f"shifting load, {result['layout']}: peak/mean and expert loads per layer and window")
        for name in ("never rebalanced", "published", "ours"):
            row = result[name]
            print(f"  {name:<18}{row['peak_over_mean']:.3f}  {row['loads_per_layer']:.1f}")
    migration = measure_migration(LAYOUTS[3], args.layers, args.seed)
    print("migration: " + ", ".join(f"{key} {value:.4g}" for key, value in migration.items()))
    worse = [f"{r.layout}, {r.trace}" for r in static if r.ours > r.published + 1e-9]
    print(f"worse than published: {'; '.join(worse) or 'nowhere'}")
    document = {
        "benchmark": "eplb",
        "config": {"layers": args.layers, "windows": args.windows, "seed": args.seed},
        "machine": machine_fingerprint(),
        "static": [asdict(result) for result in static],
        "shifting": shifting,
        "migration": migration,
        "worse_than_published": worse,
    }
    print(json_line(document))
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
