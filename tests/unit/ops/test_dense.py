"""Linear layers, norms, embeddings, quantization: native against reference, and law 1."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.ops.cases import ISAS, ids, make_cpu, normal
from xdeepserve.ops import F32, PackedWeight, WeightDtype
from xdeepserve.ops.cpu import CpuOps
from xdeepserve.ops.quant import from_bf16, to_bf16
from xdeepserve.ops.reference import ReferenceOps

DTYPES = list(WeightDtype)
SHAPES = [(5, 7), (32, 64), (33, 65), (100, 31), (15, 1), (64, 130), (1, 4)]
ROWS = [0, 1, 2, 3, 5, 7, 12, 13, 33, 100]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_agrees_with_reference(
    cpu: CpuOps,
    reference: ReferenceOps,
    rng: np.random.Generator,
    shape: tuple[int, int],
    dtype: WeightDtype,
) -> None:
    weight, bias = normal(rng, *shape), normal(rng, shape[0])
    packed, oracle = cpu.pack(weight, dtype=dtype), reference.pack(weight, dtype=dtype)
    for rows, used_bias in itertools.product(ROWS, (None, bias)):
        x = normal(rng, rows, shape[1])
        got = cpu.linear(x, packed, used_bias)
        want = reference.linear(x, oracle, used_bias)
        if dtype.has_int8_weights or dtype is WeightDtype.INT4:
            np.testing.assert_array_equal(got, want)
        else:
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_row_does_not_depend_on_its_batch(
    cpu: CpuOps, rng: np.random.Generator, dtype: WeightDtype
) -> None:
    packed = cpu.pack(normal(rng, 71, 93), dtype=dtype)
    x = normal(rng, 203, 93)
    together = cpu.linear(x, packed)
    for size in (1, 2, 3, 5, 12, 97):
        parts = [cpu.linear(x[i : i + size], packed) for i in range(0, 203, size)]
        np.testing.assert_array_equal(np.concatenate(parts), together)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_thread_count_does_not_touch_bits(
    rng: np.random.Generator, isa: str, dtype: WeightDtype
) -> None:
    weight, x = normal(rng, 300, 130), normal(rng, 150, 130)
    results = []
    for threads in (1, 2, 3):
        ops = make_cpu(isa=isa, num_threads=threads)
        results.append(ops.linear(x, ops.pack(weight, dtype=dtype)))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [d for d in WeightDtype if d is not WeightDtype.FLOAT32])
def test_every_instruction_set_gives_the_same_bits(
    rng: np.random.Generator, dtype: WeightDtype
) -> None:
    # A product of two bf16 is exact in float32, and int32 sums are exact: fused or not, the order
    # of accumulation alone decides. Groups round once for each multiply-add, everywhere.
    # Tile registers add bf16 products in an order of their own.
    weight, x = normal(rng, 70, 129), normal(rng, 9, 129)
    isas = [isa for isa in ISAS if isa != "amx" or dtype is not WeightDtype.BF16]
    results = []
    for isa in isas:
        ops = make_cpu(isa=isa)
        results.append(ops.linear(x, ops.pack(weight, dtype=dtype)))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def _sum_as_tiles_do(x: F32, weight: F32) -> F32:
    """x [M, K] times weight [N, K], both bf16 values: of every 32 k, even and odd ones apart."""
    total = np.zeros((len(x), len(weight)), np.float32)
    products = x[:, None, :] * weight[None, :, :]  # exact
    for first in range(0, x.shape[1], 32):
        even, odd = np.zeros_like(total), np.zeros_like(total)
        for k in range(first, min(first + 32, x.shape[1]), 2):
            even = even + products[:, :, k]
            if k + 1 < x.shape[1]:
                odd = odd + products[:, :, k + 1]
        total = total + (even + odd)
    return total


@pytest.mark.skipif("amx" not in ISAS, reason=f"this machine has {ISAS}")
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 40, 129), (33, 32, 64), (48, 70, 31), (40, 33, 96)]
)
def test_tile_registers_add_even_and_odd_products_of_32_apart(
    rng: np.random.Generator, shape: tuple[int, int, int]
) -> None:
    rows, n, k = shape
    ops = make_cpu(isa="amx")
    x = from_bf16(to_bf16(normal(rng, rows, k)))
    weight = from_bf16(to_bf16(normal(rng, n, k)))
    bias = normal(rng, n)
    packed = ops.pack(weight, dtype=WeightDtype.BF16)
    want = _sum_as_tiles_do(x, weight)
    np.testing.assert_array_equal(ops.linear(x, packed), want)
    np.testing.assert_array_equal(ops.linear(x, packed, bias), want + bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_round_trip_and_group_slices(
    cpu: CpuOps, reference: ReferenceOps, rng: np.random.Generator, dtype: WeightDtype
) -> None:
    weight = normal(rng, 3, 37, 21)
    weight[1, 5] = 0.0
    packed = cpu.pack(weight, dtype=dtype)
    values = cpu.unpack(packed)
    np.testing.assert_array_equal(values, reference.unpack(reference.pack(weight, dtype=dtype)))
    np.testing.assert_array_equal(cpu.unpack(packed.groups(1, 3)), values[1:])
    assert packed.data.ctypes.data % 64 == 0


def test_packed_bytes_are_the_same_on_every_instruction_set(rng: np.random.Generator) -> None:
    weight = normal(rng, 2, 45, 19)
    for dtype in DTYPES:
        packs = [make_cpu(isa=isa).pack(weight, dtype=dtype).data for isa in ISAS]
        for data in packs[1:]:
            np.testing.assert_array_equal(data, packs[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_linear_equals_linear_per_group(
    cpu: CpuOps, reference: ReferenceOps, rng: np.random.Generator, dtype: WeightDtype
) -> None:
    weight = normal(rng, 3, 40, 27)
    packed, oracle = cpu.pack(weight, dtype=dtype), reference.pack(weight, dtype=dtype)
    for tokens in (0, 1, 7):
        x = normal(rng, tokens, 3, 27)
        got = cpu.grouped_linear(x, packed)
        want = reference.grouped_linear(x, oracle)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)
        for g in range(3):
            alone = cpu.linear(np.ascontiguousarray(x[:, g]), packed.groups(g, g + 1))
            np.testing.assert_array_equal(got[:, g], alone)


@pytest.mark.parametrize("width", [1, 15, 16, 37, 576])
def test_norms(cpu: CpuOps, reference: ReferenceOps, rng: np.random.Generator, width: int) -> None:
    x, residual, weight = normal(rng, 7, width), normal(rng, 7, width), normal(rng, width)
    normed = cpu.rms_norm(x, weight, 1e-5)
    np.testing.assert_allclose(normed, reference.rms_norm(x, weight, 1e-5), rtol=2e-6, atol=1e-7)
    np.testing.assert_array_equal(cpu.rms_norm(x[3:4], weight, 1e-5)[0], normed[3])
    before = x.copy(), residual.copy()
    total, out = cpu.add_rms_norm(residual, x, weight, 1e-5)
    np.testing.assert_array_equal(total, residual + x)
    np.testing.assert_array_equal(out, cpu.rms_norm(total, weight, 1e-5))
    np.testing.assert_array_equal((x, residual), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(24, 17), (64, 33), (31, 96)])
def test_swiglu_agrees_with_reference(
    cpu: CpuOps,
    reference: ReferenceOps,
    rng: np.random.Generator,
    sizes: tuple[int, int],
    dtype: WeightDtype,
) -> None:
    hidden, inner = sizes
    gate_up, down = normal(rng, 2 * inner, hidden) / 4, normal(rng, hidden, inner) / 4
    x = normal(rng, 13, hidden)
    got = cpu.swiglu_mlp(x, cpu.pack(gate_up, dtype=dtype), cpu.pack(down, dtype=dtype))
    want = reference.swiglu_mlp(
        x, reference.pack(gate_up, dtype=dtype), reference.pack(down, dtype=dtype)
    )
    # Rounding of the inner activations may fall either way: one step of the number format.
    tolerance = {
        WeightDtype.FLOAT32: 1e-5,
        WeightDtype.BF16: 2e-2,
        WeightDtype.W8A16: 2e-2,
        WeightDtype.W8A8G64: 5e-2,
        WeightDtype.INT8: 5e-2,
        WeightDtype.INT4: 5e-2,
    }[dtype]
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


def test_swiglu_survives_extreme_gates(cpu: CpuOps) -> None:
    eye = np.eye(2, dtype=np.float32)
    gate_up = np.concatenate([eye, np.ones((2, 2), np.float32)])
    x = np.array([[1e4, -1e4], [-200.0, 90.0], [0.0, 0.0]], np.float32)
    out = cpu.swiglu_mlp(
        x,
        cpu.pack(gate_up, dtype=WeightDtype.FLOAT32),
        cpu.pack(eye, dtype=WeightDtype.FLOAT32),
    )
    up = x.sum(axis=1)
    np.testing.assert_allclose(out[:, 0], [0.0, 0.0, 0.0], atol=1e-30)
    np.testing.assert_allclose(out[1, 1], 90.0 * up[1], rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [(0, 0, 0), (3, 0, 5), (0, 1, 0), (40, 2, 110)])
def test_expert_rows_equal_swiglu_with_that_expert(
    cpu: CpuOps, rng: np.random.Generator, counts: tuple[int, ...], dtype: WeightDtype
) -> None:
    gate_up = cpu.pack(normal(rng, 3, 2 * 48, 40), dtype=dtype)
    down = cpu.pack(normal(rng, 3, 40, 48), dtype=dtype)
    x = normal(rng, sum(counts), 40)
    got = cpu.expert_mlp(x, ids(*counts), gate_up, down)
    start = 0
    for e, count in enumerate(counts):
        rows = x[start : start + count]
        want = cpu.swiglu_mlp(rows, gate_up.groups(e, e + 1), down.groups(e, e + 1))
        np.testing.assert_array_equal(got[start : start + count], want)
        start += count


def packed32(ops: CpuOps | ReferenceOps, weight: F32) -> PackedWeight:
    return ops.pack(weight, dtype=WeightDtype.FLOAT32)


def test_mlp_rows_are_written_where_they_are_wanted(
    cpu: CpuOps, reference: ReferenceOps, rng: np.random.Generator
) -> None:
    weights, x = (normal(rng, 3, 2 * 48, 40), normal(rng, 3, 40, 48)), normal(rng, 8, 40)
    for ops in (cpu, reference):
        gate_up, down = (packed32(ops, each) for each in weights)
        memory = np.full((10, 40), -1, np.float32)
        out = memory[1:9]
        assert ops.expert_mlp(x, ids(3, 0, 5), gate_up, down, out) is out
        np.testing.assert_array_equal(out, ops.expert_mlp(x, ids(3, 0, 5), gate_up, down))
        first = gate_up.groups(0, 1), down.groups(0, 1)
        assert ops.swiglu_mlp(x, *first, out) is out
        np.testing.assert_array_equal(out, ops.swiglu_mlp(x, *first))
        assert (memory[[0, 9]] == -1).all()
    with pytest.raises(ValueError, match=r"out must be \[R, H\]"):
        cpu.expert_mlp(x, ids(3, 0, 5), *(packed32(cpu, each) for each in weights), memory)


@pytest.mark.parametrize("stored", ["float32", "bf16"])
def test_embed_copies_rows(cpu: CpuOps, rng: np.random.Generator, stored: str) -> None:
    table = normal(rng, 9, 21)
    bits = to_bf16(table)
    want = table if stored == "float32" else (bits.astype(np.uint32) << 16).view(np.float32)
    chosen = ids(3, 8, 0, 3)
    got = cpu.embed(table if stored == "float32" else bits, chosen)
    np.testing.assert_array_equal(got, want[chosen])
    assert cpu.embed(table, ids()).shape == (0, 21)


def test_quantize_rows_equals_reference(
    cpu: CpuOps, reference: ReferenceOps, rng: np.random.Generator
) -> None:
    x = normal(rng, 9, 45) * np.float32(10.0) ** np.arange(-4, 5, dtype=np.float32)[:, None]
    x[2], x[3] = 0.0, 1e-38
    x[4, :4] = [127.0, 0.5, 1.5, -2.5]
    x[4, 4:] = 0.0
    got, want = cpu.quantize_rows(x), reference.quantize_rows(x)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(got[0][4, :4], [127, 0, 2, -2])
    assert got[1][2] == got[1][3] == 0.0


@settings(max_examples=30, deadline=None)
@given(data=st.data(), rows=st.integers(1, 6), width=st.integers(1, 70))
def test_int8_gemm_is_exact(data: st.DataObject, rows: int, width: int) -> None:
    entries = st.floats(-1e3, 1e3, width=32)
    flat = data.draw(st.lists(entries, min_size=(rows + 3) * width, max_size=(rows + 3) * width))
    values = np.array(flat, np.float32).reshape(rows + 3, width)
    x, weight = values[:rows], np.ascontiguousarray(values[rows:])
    oracle = ReferenceOps()
    want = oracle.linear(x, oracle.pack(weight, dtype=WeightDtype.INT8))
    for isa in ISAS:
        ops = make_cpu(isa=isa)
        np.testing.assert_array_equal(ops.linear(x, ops.pack(weight, dtype=WeightDtype.INT8)), want)


def test_int8_extremes_do_not_saturate(cpu: CpuOps, reference: ReferenceOps) -> None:
    signs = np.where(np.arange(512) % 3 == 0, -1, 1).astype(np.float32)
    weight = np.stack([signs, np.ones(512, np.float32), -signs])
    x = np.stack([signs, -signs, np.ones(512, np.float32)])
    got = cpu.linear(x, cpu.pack(weight, dtype=WeightDtype.INT8))
    want = reference.linear(x, reference.pack(weight, dtype=WeightDtype.INT8))
    np.testing.assert_array_equal(got, want)


def test_read_only_weights_are_accepted(cpu: CpuOps, rng: np.random.Generator) -> None:
    packed = cpu.pack(normal(rng, 8, 8), dtype=WeightDtype.BF16)
    x = normal(rng, 2, 8)
    want = cpu.linear(x, packed)
    packed.data.flags.writeable = False
    np.testing.assert_array_equal(cpu.linear(x, packed), want)


def test_wrong_arguments_are_refused(cpu: CpuOps, rng: np.random.Generator) -> None:
    packed = cpu.pack(normal(rng, 8, 6), dtype=WeightDtype.FLOAT32)
    x = normal(rng, 2, 6)
    with pytest.raises(ValueError, match="row length of x is 5; it must be 6"):
        cpu.linear(x[:, :5].copy(), packed)
    with pytest.raises(ValueError, match="bias length"):
        cpu.linear(x, packed, normal(rng, 7))
    with pytest.raises(TypeError):
        cpu.linear(x.astype(np.float64), packed)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        cpu.linear(np.asfortranarray(normal(rng, 3, 6)), packed)
    short = PackedWeight(packed.layout, packed.dtype, packed.shape, packed.data[:-64])
    with pytest.raises(ValueError, match="packed weight size"):
        cpu.linear(x, short)
    foreign = PackedWeight("rows/1", packed.dtype, packed.shape, packed.data)
    with pytest.raises(ValueError, match="rows/1"):
        cpu.linear(x, foreign)
    with pytest.raises(ValueError, match=r"token_ids\[1\] is 4; it must lie in \[0, 4\)"):
        cpu.embed(normal(rng, 4, 8), ids(0, 4))
    experts = cpu.pack(normal(rng, 2, 8, 6), dtype=WeightDtype.FLOAT32)
    down = cpu.pack(normal(rng, 2, 6, 4), dtype=WeightDtype.FLOAT32)
    for counts in (ids(1, 2), ids(-1, 3), ids(2)):
        with pytest.raises(ValueError, match="num_tokens_per_expert"):
            cpu.expert_mlp(x, counts, experts, down)
