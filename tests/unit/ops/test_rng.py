"""The counter-based generator against the published known answers."""

from __future__ import annotations

import numpy as np
import pytest

from xdeepserve.ops import rng

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    # Source: kat_vectors of the Random123 library, philox4x32 with 10 rounds.
    got = rng.philox4x32(np.array([counter], np.uint64), np.array([key], np.uint64))
    np.testing.assert_array_equal(got[0], words)


def test_uniform_is_a_function_of_seed_and_position_alone() -> None:
    seeds = np.array([1, 2**64 - 1, 1, 7], np.uint64)
    positions = np.array([0, 5, 1, 2**40], np.int64)
    together = rng.uniform(seeds, positions)
    for i in range(4):
        assert rng.uniform(seeds[i : i + 1], positions[i : i + 1])[0] == together[i]
    assert len(set(together.tolist())) == 4


def test_uniform_covers_the_unit_interval_evenly() -> None:
    numbers = rng.uniform(np.full(100_000, 3, np.uint64), np.arange(100_000, dtype=np.int64))
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    counts = np.histogram(numbers, bins=10, range=(0, 1))[0]
    assert (np.abs(counts - 10_000) < 400).all()  # 4 standard deviations
