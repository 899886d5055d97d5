"""Choice of backend, instruction set and threads; calls from several threads; number formats."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.unit.ops.cases import ISAS, make_cpu, make_paged, normal
from xdeepserve import _native, envs
from xdeepserve.errors import ConfigError
from xdeepserve.ops import GateSpec, WeightDtype, get_ops
from xdeepserve.ops.cpu import CpuOps, default_num_threads
from xdeepserve.ops.cpu_views import DTYPE_CODES
from xdeepserve.ops.quant import from_bf16, quantize_int8, split_int15, to_bf16


def test_get_ops_knows_two_backends() -> None:
    assert get_ops("cpu", num_threads=1).name == "cpu"
    assert get_ops("reference").name == "reference"
    with pytest.raises(ConfigError, match="use cpu or reference"):
        get_ops("tpu")


def test_the_instruction_set_can_be_forced() -> None:
    assert ISAS[0] == "portable"
    assert make_cpu(isa="auto").isa == ISAS[-1]
    for isa in ISAS:
        assert make_cpu(isa=isa).isa == isa


def test_a_missing_instruction_set_names_what_there_is() -> None:
    missing = [isa for isa in ("avx2", "avx512", "amx") if isa not in ISAS]
    for isa in missing:
        with pytest.raises(ConfigError, match="which has portable"):
            make_cpu(isa=isa)
    with pytest.raises(ValueError, match="not available"):
        _native.Context("sse9", 1)


def test_the_number_of_threads_comes_from_argument_or_environment() -> None:
    assert make_cpu(num_threads=3).num_threads == 3
    with envs.NUM_THREADS.override("2"):
        assert CpuOps().num_threads == 2
    with envs.NUM_THREADS.override(None):
        assert default_num_threads() >= 1
    with pytest.raises(ValueError, match="num_threads"):
        _native.Context("auto", 0)


def test_calls_from_many_threads_take_turns() -> None:
    ops = make_cpu(num_threads=2)
    rng = np.random.default_rng(1)
    weight = ops.pack(normal(rng, 130, 70), dtype=WeightDtype.INT8)
    inputs = [normal(rng, 1 + i, 70) for i in range(24)]
    want = [ops.linear(x, weight) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda x: ops.linear(x, weight), inputs * 5))
    for i, result in enumerate(got):
        np.testing.assert_array_equal(result, want[i % 24])


def test_threads_wake_after_they_slept() -> None:
    ops = make_cpu(num_threads=3)
    rng = np.random.default_rng(2)
    weight, x = ops.pack(normal(rng, 256, 64), dtype=WeightDtype.FLOAT32), normal(rng, 8, 64)
    want = ops.linear(x, weight)
    for _ in range(50):
        make_cpu(num_threads=2)  # starting threads takes longer than a worker spins
        np.testing.assert_array_equal(ops.linear(x, weight), want)


@pytest.mark.parametrize("isa", ISAS)
def test_measuring_functions_return_plausible_numbers(isa: str) -> None:
    context = make_cpu(isa=isa, num_threads=1).native
    assert context.read_bandwidth(1 << 20, 1) > 1e8
    for dtype in DTYPE_CODES.values():
        assert context.gemm_peak(dtype, 1) > 1e7


def test_bf16_rounds_to_nearest_even_and_keeps_nan() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -0.0, np.inf, np.nan, 3.4e38], np.float32)
    back = from_bf16(to_bf16(values))
    np.testing.assert_array_equal(back[:5], np.array([1.0, 1.0, 1.015625, -0.0, np.inf]))
    assert np.isnan(back[5])
    assert np.isinf(back[6])
    every = np.arange(2**16, dtype=np.uint16)
    finite = every[np.isfinite(from_bf16(every))]
    np.testing.assert_array_equal(to_bf16(from_bf16(finite)), finite)


def test_int8_rows_are_symmetric_and_bounded() -> None:
    rows, scales = quantize_int8(np.array([[2.0, -2.0, 1.0], [0.0, 0.0, 0.0]], np.float32))
    np.testing.assert_array_equal(rows, [[127, -127, 64], [0, 0, 0]])
    np.testing.assert_array_equal(scales, np.array([2 / 127, 0], np.float32))


def test_rows_of_15_bits_are_two_int8_rows() -> None:
    rows = np.array([[2.0, -2.0, 1.0, 1e-3], [0.0] * 4, [1e4, 1.0, -0.7, 0.5]], np.float32)
    coarse, fine, scales = split_int15(rows)
    np.testing.assert_array_equal(coarse[:2], [[127, -127, 64, 0], [0, 0, 0, 0]])
    back = (coarse + fine.astype(np.float32) / 128) * scales[:, None]
    largest = np.abs(rows).max(axis=1, keepdims=True)
    assert (np.abs(back - rows) <= largest / 16319 / 2 * 1.001).all()
    assert np.abs(fine.astype(np.int32)).max() <= 64


def test_instruction_sets_with_fused_multiply_add_give_the_same_bits() -> None:
    fused = [isa for isa in ISAS if isa not in ("portable", "amx")]
    if len(fused) < 2:
        pytest.skip(f"this machine has {ISAS}")
    first, *others = (_every_kernel(make_cpu(isa=isa)) for isa in fused)
    for other in others:
        for got, want in zip(other, first, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.skipif("amx" not in ISAS, reason=f"this machine has {ISAS}")
def test_tile_registers_change_no_bits_but_those_of_bf16_products() -> None:
    amx, avx512 = (_every_kernel(make_cpu(isa=isa)) for isa in ("amx", "avx512"))
    differ = [
        idx for idx, pair in enumerate(zip(amx, avx512, strict=True)) if (pair[0] != pair[1]).any()
    ]
    bf16 = 3 + 2 * list(WeightDtype).index(WeightDtype.BF16)
    assert differ == [bf16, bf16 + 1]


def _every_kernel(ops: CpuOps) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    x, gate_up, down = normal(rng, 19, 129), normal(rng, 96, 129), normal(rng, 129, 48)
    results = [ops.rms_norm(x, normal(rng, 129), 1e-5), *ops.quantize_rows(x)]
    for dtype in WeightDtype:
        packed = ops.pack(gate_up, dtype=dtype), ops.pack(down, dtype=dtype)
        results += [ops.linear(x, packed[0]), ops.swiglu_mlp(x, *packed)]
    paged = make_paged(rng, [(3, 100), (1, 200)], heads=2, dim=24)
    q = normal(rng, 4, 6, 24)
    results.append(ops.paged_attention(q, paged.batch, paged.kv, scale=0.2))
    results += ops.gate_topk(x, GateSpec(129, 4, "softmax", True))
    return results
