"""Counter-based random numbers: the same (seed, position) gives the same number everywhere.

Generator: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
No state is kept, so batch, preemption and migration cannot change what a request draws.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10

U64 = npt.NDArray[np.uint64]


def philox4x32(counter: U64, key: U64) -> U64:
    """Ten rounds of Philox4x32.

    Args:
        counter: [B, 4] uint64, each below 2**32.
        key: [B, 2] uint64, each below 2**32.

    Returns:
        [B, 4] uint64, each below 2**32.
    """
    c0, c1, c2, c3 = (counter[:, i] for i in range(4))
    k0, k1 = key[:, 0], key[:, 1]
    for _ in range(_ROUNDS):
        p0 = _MULTIPLIERS[0] * c0
        p1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _MASK, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _MASK
        k0 = (k0 + _KEY_STEPS[0]) & _MASK
        k1 = (k1 + _KEY_STEPS[1]) & _MASK
    return np.stack([c0, c1, c2, c3], axis=1)


def uniform(seeds: U64, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """[B] float64 in [0, 1), a pure function of each (seed, position) pair.

    Args:
        seeds: [B] uint64.
        positions: [B] int64, not negative.
    """
    low_half, high_half = positions.astype(np.uint64) & _MASK, positions.astype(np.uint64) >> _SHIFT
    zeros = np.zeros_like(low_half)
    counter = np.stack([low_half, high_half, zeros, zeros], axis=1)
    words = philox4x32(counter, np.stack([seeds & _MASK, seeds >> _SHIFT], axis=1))
    high, low = words[:, 0] >> np.uint64(5), words[:, 1] >> np.uint64(6)
    bits53 = (high << np.uint64(26)) | low
    return bits53.astype(np.float64) * 2.0**-53
