"""Making the pages of mapped expert weights present before tokens need them.

Weights are mapped from the packed file; a page that nobody in this process has used costs a fault,
perhaps a read from the disk. The operator's thread should not be the one that pays it.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from xdeepserve.models.units import ExpertUnit
from xdeepserve.ops import PackedWeight

MADV_POPULATE_READ: Final = 22
"""Of madvise(2), Linux 5.14 and later."""

CHUNK_BYTES: Final = 4 << 20
"""Per system call, so that whoever maps memory meanwhile does not wait long."""

_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_madvise.restype = ctypes.c_int


def load_experts(units: Sequence[ExpertUnit | None], experts: Iterable[tuple[int, int]]) -> int:
    """Make the weights of experts present; blocks, without the interpreter lock.

    Args:
        units: of each layer; None = a layer without experts.
        experts: (layer, expert); those that this model does not have are skipped.

    Returns:
        Bytes of their weights.
    """
    num_bytes = 0
    for layer_idx, expert in experts:
        unit = units[layer_idx] if 0 <= layer_idx < len(units) else None
        if unit is None or not 0 <= expert - unit.first < unit.num_experts:
            continue
        one = unit.experts(expert, expert + 1)
        for weight in (one.gate_up, one.down):
            _make_present(weight)
            num_bytes += weight.data.nbytes
    return num_bytes


def _make_present(weight: PackedWeight) -> None:
    begin = weight.data.ctypes.data
    stop = begin + weight.data.nbytes
    begin -= begin % mmap.PAGESIZE
    for start in range(begin, stop, CHUNK_BYTES):
        if _madvise(start, min(CHUNK_BYTES, stop - start), MADV_POPULATE_READ) != 0:
            # An older kernel: read a byte of each page.
            np.add.reduce(weight.data[:: mmap.PAGESIZE])
            return
