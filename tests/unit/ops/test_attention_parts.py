"""Contexts cut for several threads: parts are merged as where one thread has all of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.unit.ops.cases import ISAS, make_cpu, make_paged
from xdeepserve.ops.quant import to_bf16


@pytest.mark.parametrize("isa", ISAS)
def test_tiny_parts_are_merged_alike_by_one_thread_and_by_many(
    isa: str, rng: np.random.Generator
) -> None:
    paged = make_paged(rng, [(1, 300)], heads=1, dim=32, dtype=np.uint16)
    keys, values = (np.zeros_like(array) for array in (paged.kv.k, paged.kv.v))
    for position in range(300):
        block = paged.batch.block_tables[0, position // 16]
        is_late = position >= 256  # a partition of its own, with weights of e^-80
        keys[block, 0, 0, position % 16] = (
            0 if is_late else to_bf16(np.array([80.0], np.float32))[0]
        )
        values[block, 0, position % 16] = to_bf16(np.array([1e-4 * is_late], np.float32))[0]
    kv = dataclasses.replace(paged.kv, k=keys, v=values)
    q = np.zeros((1, 1, 32), np.float32)
    q[..., 0] = 1.0
    one, many = (
        make_cpu(isa=isa, num_threads=n).paged_attention(q, paged.batch, kv, scale=1.0)
        for n in (1, 4)
    )
    np.testing.assert_array_equal(one, many)
