"""Timing of one call, by its distribution: what every part of the benchmark uses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Numbers = dict[str, Any]

MIN_ROUNDS, MAX_ROUNDS = 10, 1_000_000


def timed(call: Callable[[], object], rounds: int) -> Numbers:
    """p50, p99 and mean of one call in microseconds, over `rounds` calls."""
    times = np.empty(rounds)
    for i in range(rounds):
        start = time.perf_counter_ns()
        call()
        times[i] = time.perf_counter_ns() - start
    p50, p99 = np.percentile(times, (50, 99)) / 1e3
    mean = float(times.mean()) / 1e3
    return {
        "p50": round(float(p50), 3),
        "p99": round(float(p99), 3),
        "mean": round(mean, 3),
        "rounds": rounds,
    }


def rounds_for(call: Callable[[], object], seconds: float) -> int:
    """Warms up with MIN_ROUNDS calls and says how many fit the time, by the fastest of them."""
    fastest = math.inf
    for _ in range(MIN_ROUNDS):
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
    return int(min(MAX_ROUNDS, max(MIN_ROUNDS, seconds / max(fastest, 1e-7))))
