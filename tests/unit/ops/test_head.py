"""LM head: ids and logits equal those of `linear` and `sample`, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.ops.cases import ISAS, make_cpu, normal
from tests.unit.ops.test_choice import make_params
from xdeepserve.ops import F32, I32, Ops, WeightDtype
from xdeepserve.ops.cpu import CpuOps
from xdeepserve.ops.reference import ReferenceOps

DTYPES = list(WeightDtype)


def greedy(ops: Ops, logits: F32) -> I32:
    count = logits.shape[0]
    return ops.sample(logits, make_params(count, np.zeros(count), temperature=0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 31, 32, 100, 1003])
def test_equals_linear_and_sample(
    cpu: CpuOps, rng: np.random.Generator, vocab: int, dtype: WeightDtype
) -> None:
    packed = cpu.pack(normal(rng, vocab, 29), dtype=dtype)
    for rows in (0, 1, 3, 13, 260):
        x = normal(rng, rows, 29)
        logits = cpu.linear(x, packed)
        for num_greedy in {0, rows // 2, max(0, rows - 1), rows}:
            ids, others = cpu.lm_head(x, packed, num_greedy)
            np.testing.assert_array_equal(ids, greedy(cpu, logits[:num_greedy]))
            np.testing.assert_array_equal(others, logits[num_greedy:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_reference(
    cpu: CpuOps, reference: ReferenceOps, rng: np.random.Generator, dtype: WeightDtype
) -> None:
    weight, x = normal(rng, 203, 64), normal(rng, 9, 64)
    got = cpu.lm_head(x, cpu.pack(weight, dtype=dtype), 6)
    want = reference.lm_head(x, reference.pack(weight, dtype=dtype), 6)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_the_lowest_id_of_a_tie_whoever_computes_it(isa: str, num_threads: int) -> None:
    ops = make_cpu(isa=isa, num_threads=num_threads)
    weight = np.full((2048, 32), -1.0, np.float32)
    weight[[40, 41, 72, 1999]] = 1.0
    x = np.ones((4, 32), np.float32)
    x[1] = -1.0  # now all others are equal: 0 is the first
    x[2] = 0.0
    x[3] = np.nan
    packed = ops.pack(weight, dtype=WeightDtype.FLOAT32)
    ids, logits = ops.lm_head(x, packed, 4)
    np.testing.assert_array_equal(ids, [40, 0, 0, 0])
    assert logits.shape == (0, 2048)


def test_shapes_are_checked(cpu: CpuOps, rng: np.random.Generator) -> None:
    packed = cpu.pack(normal(rng, 8, 4), dtype=WeightDtype.FLOAT32)
    shape = (0, *packed.shape)
    with pytest.raises(ValueError, match="row length"):
        cpu.lm_head(normal(rng, 2, 5), packed, 1)
    with pytest.raises(ValueError, match="one row per row of x"):
        cpu.native.lm_head(
            normal(rng, 3, 4), packed.data, shape, np.empty(1, np.int32), np.empty((1, 8), "f4")
        )
