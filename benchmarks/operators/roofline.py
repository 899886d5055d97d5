"""How fast an operator could be here: what it must move and multiply, against what the machine can.

The bound of a call is the longest of three times: bytes that come from memory over the bandwidth of
memory, bytes that an operator before left in a cache over the bandwidth of a core's cache, and
operations over the GEMM peak of the precision class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import Final

import numpy as np

from xdeepserve.ops import WeightDtype
from xdeepserve.ops.cpu import CpuOps
from xdeepserve.ops.machine import READ_BYTES, measure_ceilings

CACHE_BYTES: Final = 1 << 20
"""Fits the cache of a core; the least that `read_bandwidth` reads."""

CACHE_REPEATS: Final = 100
MEMORY_REPEATS: Final = 5
NUM_EMPTY_CALLS: Final = 2000


@dataclass(frozen=True, slots=True)
class Work:
    """What one call cannot avoid.

    Attributes:
        memory_bytes: weights and cached keys and values, each once.
        cache_bytes: activations in and out.
        operations: multiplications and additions of matrix products.
        dtype: precision class of the products; None = there are none.
    """

    memory_bytes: float = 0.0
    cache_bytes: float = 0.0
    operations: float = 0.0
    dtype: WeightDtype | None = None

    def amount(self, bound: str) -> float:
        """Bytes, or operations, that `bound` is about."""
        amounts = {
            "memory": self.memory_bytes,
            "cache": self.cache_bytes,
            "compute": self.operations,
        }
        return amounts[bound]


@dataclass(frozen=True, slots=True)
class Roof:
    """What the machine can do with the threads of the operators.

    Attributes:
        memory_gb_per_s: read bandwidth over as many bytes as the operands of a case have.
        cache_gb_per_s: read bandwidth of all threads, each in the cache of its core.
        gemm_gflop_per_s: peak by precision class; int8 and int4 in GOP/s.
        read_gb_per_s: memory bandwidth as other benchmarks quote it (`measure_ceilings`).
        call_us: a call that has next to nothing to do; no operator called from Python is faster.
    """

    threads: int
    isa: str
    memory_gb_per_s: float
    cache_gb_per_s: float
    gemm_gflop_per_s: dict[str, float]
    read_gb_per_s: float
    call_us: float

    def bound_of(self, work: Work) -> tuple[str, float]:
        """(memory, cache or compute; the seconds below which no call can be)."""
        peak = self.gemm_gflop_per_s[work.dtype] if work.dtype is not None else float("inf")
        seconds = {
            "memory": work.memory_bytes / self.memory_gb_per_s / 1e9,
            "cache": work.cache_bytes / self.cache_gb_per_s / 1e9,
            "compute": work.operations / peak / 1e9,
        }
        name = max(seconds, key=seconds.__getitem__)
        return name, seconds[name]


def measure_roof(ops: CpuOps, footprint: int) -> Roof:
    """Measure with the threads of `ops`; takes about two seconds."""
    ceilings = measure_ceilings(ops.num_threads)
    one_thread = CpuOps(num_threads=1).native.read_bandwidth(CACHE_BYTES, CACHE_REPEATS) / 1e9
    return Roof(
        threads=ceilings.threads,
        isa=ceilings.isa,
        memory_gb_per_s=ops.native.read_bandwidth(footprint, MEMORY_REPEATS) / 1e9,
        cache_gb_per_s=one_thread * ops.num_threads,
        gemm_gflop_per_s=ceilings.gemm_gflop_per_s,
        read_gb_per_s=ceilings.read_gb_per_s,
        call_us=_call_us(ops),
    )


def _call_us(ops: CpuOps) -> float:
    row, weight = np.ones((1, 16), np.float32), np.ones(16, np.float32)
    call = partial(ops.rms_norm, row, weight, 1e-6)
    call()
    return timeit(call, number=NUM_EMPTY_CALLS) / NUM_EMPTY_CALLS * 1e6


def memory_footprint() -> int:
    """Bytes that no cache here holds: twice the last level, if a 16th of the memory allows."""
    wanted = max(READ_BYTES, 2 * last_level_cache_bytes())
    return min(wanted, max(READ_BYTES, _available_bytes() // 16))


def last_level_cache_bytes() -> int:
    """Size of the largest cache of the first core; 0 where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:])
        sizes.append(int(text[:-1]) * unit if unit else int(text))
    return max(sizes)


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0
