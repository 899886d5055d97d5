"""The 4-bit weights: what the format holds, what it loses, and sums at their limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.ops.cases import ISAS, make_cpu, normal
from xdeepserve.ops import WeightDtype
from xdeepserve.ops.cpu import CpuOps
from xdeepserve.ops.quant import from_bf16, quantize_int4
from xdeepserve.ops.reference import ReferenceOps

INT4 = WeightDtype.INT4


@settings(max_examples=30, deadline=None)
@given(data=st.data(), rows=st.integers(1, 6), width=st.integers(1, 100))
def test_gemm_equals_reference(data: st.DataObject, rows: int, width: int) -> None:
    entries = st.floats(-1e3, 1e3, width=32)
    flat = data.draw(st.lists(entries, min_size=(rows + 3) * width, max_size=(rows + 3) * width))
    values = np.array(flat, np.float32).reshape(rows + 3, width)
    x, weight = values[:rows], np.ascontiguousarray(values[rows:])
    oracle = ReferenceOps()
    want = oracle.linear(x, oracle.pack(weight, dtype=INT4))
    for isa in ISAS:
        ops = make_cpu(isa=isa)
        np.testing.assert_array_equal(ops.linear(x, ops.pack(weight, dtype=INT4)), want)


def test_extremes_do_not_saturate(cpu: CpuOps, reference: ReferenceOps) -> None:
    # All nibbles 15 but one per group, all activations 127 or -127: the largest sums there are.
    weight = np.ones((3, 512), np.float32)
    weight[0, ::32] = weight[1, 31::32] = 0.0
    weight[2] = -weight[0]
    x = np.stack([np.ones(512), -np.ones(512), np.where(np.arange(512) % 2, 1, -1)])
    x = x.astype(np.float32)
    got = cpu.linear(x, cpu.pack(weight, dtype=INT4))
    np.testing.assert_array_equal(got, reference.linear(x, reference.pack(weight, dtype=INT4)))
    np.testing.assert_allclose(got, x @ weight.T, rtol=1e-2, atol=1e-2)


def test_a_grid_of_sixteen_values_is_kept(cpu: CpuOps, rng: np.random.Generator) -> None:
    nibbles = rng.integers(0, 16, (5, 3, 32))
    nibbles[..., 0], nibbles[..., 1] = 0, 15
    scale, low = np.float32(0.25), np.float32(-1.5)
    weight = (nibbles * scale + low).astype(np.float32).reshape(5, 96)
    np.testing.assert_array_equal(cpu.unpack(cpu.pack(weight, dtype=INT4))[0], weight)


def test_error_is_at_most_half_a_step_and_a_bit(rng: np.random.Generator) -> None:
    weight = normal(rng, 40, 320)
    nibbles, scale_bits, low_bits = quantize_int4(weight)
    scales, lows = (np.repeat(from_bf16(bits), 32, axis=1) for bits in (scale_bits, low_bits))
    error = np.abs(nibbles * scales + lows - weight)
    rounding = 2.0**-8 * (15 * scales + np.abs(lows))
    assert (error <= 0.5 * scales + rounding).all()
    # Normal values lose what 4 bits per group of 32 must lose, and not more.
    assert 0.06 < np.sqrt(np.mean(error**2)) < 0.09


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-38])
def test_a_constant_group_is_its_low(cpu: CpuOps, value: float) -> None:
    weight = np.full((2, 40), value, np.float32)
    np.testing.assert_allclose(cpu.unpack(cpu.pack(weight, dtype=INT4))[0], weight, atol=1e-37)


def test_an_outlier_touches_its_own_group_only(cpu: CpuOps, rng: np.random.Generator) -> None:
    weight, x = normal(rng, 64, 256), normal(rng, 4, 256)
    weight[:, :32] = 0.0
    packed = cpu.pack(weight, dtype=INT4)
    loud = x.copy()
    loud[:, 7] = 1000.0  # with one scale per row the others would be rounded away
    np.testing.assert_array_equal(cpu.linear(loud, packed), cpu.linear(x, packed))


def test_a_row_without_a_number_stays_without_one(cpu: CpuOps, rng: np.random.Generator) -> None:
    packed, x = cpu.pack(normal(rng, 33, 70), dtype=INT4), normal(rng, 3, 70)
    before = cpu.linear(x, packed)
    x[1] = np.inf
    after = cpu.linear(x, packed)
    assert not np.isfinite(after[1]).any()
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])


def test_five_bits_a_weight(cpu: CpuOps, rng: np.random.Generator) -> None:
    assert cpu.pack(normal(rng, 64, 128), dtype=INT4).data.size * 8 == 5 * 64 * 128
