"""Limits of this machine as the native core measures them: what every benchmark is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from xdeepserve.ops.cpu import CpuOps
from xdeepserve.ops.cpu_views import DTYPE_CODES
from xdeepserve.ops.types import WeightDtype

READ_BYTES: Final = 256 << 20
"""Beyond the last-level cache of common machines, so that reads come from memory."""

REPEATS: Final = 5


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Best of several repeats.

    Attributes:
        threads: operator threads used.
        read_gb_per_s: memory read bandwidth, 1e9 bytes per second.
        gemm_gflop_per_s: register-resident GEMM peak per weight dtype; int8 in GOP/s.
    """

    threads: int
    isa: str
    read_gb_per_s: float
    gemm_gflop_per_s: dict[str, float]


def measure_ceilings(num_threads: int = 0) -> Ceilings:
    """Measure with the given number of threads (0 = the default); takes about a second."""
    ops = CpuOps(num_threads=num_threads)
    gemm = {
        str(dtype): ops.native.gemm_peak(DTYPE_CODES[dtype], REPEATS) / 1e9 for dtype in WeightDtype
    }
    bandwidth = ops.native.read_bandwidth(READ_BYTES, REPEATS) / 1e9
    return Ceilings(ops.num_threads, ops.isa, bandwidth, gemm)
