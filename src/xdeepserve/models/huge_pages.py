"""Memory in huge pages where the system allows it: fewer TLB misses over large arrays.

The system has three answers (`xds doctor` shows them): always, on advice, never. We only advise, so
a system that refuses costs nothing; a page becomes a huge one when it is first written or read.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from pathlib import Path
from typing import Final

import numpy as np

from xdeepserve.ops import Array
from xdeepserve.ops.types import U8

HUGE_PAGE_BYTES: Final = 2 << 20

_MADV_HUGEPAGE: Final[int | None] = getattr(mmap, "MADV_HUGEPAGE", None)
"""None where the system knows no such advice."""


def huge_zeros(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
    """Zeros; memory is committed when it is first written, in huge pages where allowed.

    Raises:
        MemoryError: the system does not have so much.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < HUGE_PAGE_BYTES:
        return np.zeros(shape, dtype)
    try:
        # Private: a shared one would be bound to the rules for files in memory.
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as exc:
        raise MemoryError(f"{nbytes} bytes cannot be mapped: {exc.strerror}") from exc
    _advise(mapping)
    return np.frombuffer(mapping, dtype).reshape(shape)


def map_file(path: Path) -> U8:
    """The bytes of a file that is not empty, mapped read-only, in huge pages where allowed.

    Raises:
        OSError: it cannot be opened or mapped.
    """
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _advise(mapping)
    return np.frombuffer(mapping, np.uint8)


def _advise(mapping: mmap.mmap) -> None:
    if _MADV_HUGEPAGE is not None:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(_MADV_HUGEPAGE)
