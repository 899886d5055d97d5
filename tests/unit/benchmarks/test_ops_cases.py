"""bench_ops: every operator has cases, operands come from memory, the longest bound counts."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
from benchmarks import bench_ops
from benchmarks.operators.attention_cases import paged_attention
from benchmarks.operators.case import TINY_SIZES, Case, Sizes
from benchmarks.operators.cases import linear
from benchmarks.operators.expert_cases import expert_mlp
from benchmarks.operators.measure import Side, Timing
from benchmarks.operators.models import spec_of, toy_spec_of
from benchmarks.operators.operands import Operands, StepShape, WeightPart
from benchmarks.operators.registry import CASES, WITHOUT_TORCH, cases_of
from benchmarks.operators.roofline import Roof, Work
from benchmarks.operators.torch_operands import TorchOperands, import_torch
from benchmarks.peers.models import DENSE, MODELS, UPCYCLED

from xdeepserve import store
from xdeepserve.models.families import parse_spec
from xdeepserve.models.kv_cache import KVDtype
from xdeepserve.ops import Ops, WeightDtype
from xdeepserve.ops.cpu import CpuOps

FOOTPRINT = 1 << 18


def operators_of_the_contract() -> set[str]:
    functions = inspect.getmembers(Ops, inspect.isfunction)
    return {name for name, _ in functions if not name.startswith("_")}


def tiny_cases(*operators: str) -> list[Case]:
    specs = [toy_spec_of(model) for model in MODELS]
    return [case for spec in specs for case in cases_of(spec, TINY_SIZES, operators or list(CASES))]


@pytest.fixture(scope="module")
def operands() -> Operands:
    return Operands(CpuOps(num_threads=1), FOOTPRINT)


# -- coverage -----------------------------------------------------------------------------------


def test_every_operator_of_the_contract_has_cases_in_the_four_models() -> None:
    specs = [spec_of(model) for model in MODELS]
    found = {
        name for name in CASES if any(next(CASES[name](spec, Sizes()), None) for spec in specs)
    }
    assert found == operators_of_the_contract()


def test_an_operator_without_torch_says_why() -> None:
    without = {case.operator for case in tiny_cases() if case.torch is None}
    assert without <= set(WITHOUT_TORCH)


def test_products_are_measured_at_every_size_in_every_precision() -> None:
    sizes = Sizes()
    found = {
        (case.what, case.dtype, case.tokens) for case in linear(spec_of("qwen3-moe-random"), sizes)
    }
    tokens = (1, 8, 32, 64, 512)
    expected = {
        (name, dtype, count)
        for name in ("qkv", "output")
        for dtype in ("bf16", "w8a16", "w8a8g64", "int8", "int4")
        for count in tokens
    }
    assert found == expected | {("router", "float32", count) for count in tokens}


def test_attention_decodes_and_prefills_at_short_and_long_contexts() -> None:
    found = {
        (case.dtype, case.tokens, case.context)
        for case in paged_attention(spec_of("qwen3-moe-random"), Sizes())
    }
    steps = [(count, context) for count in (1, 8, 32, 64) for context in (256, 4096)]
    steps += [(512, 512), (512, 4096)]
    assert found == {(dtype, *step) for dtype in ("bf16", "int8") for step in steps}


@pytest.mark.weights
@pytest.mark.parametrize("model", [DENSE, UPCYCLED])
def test_the_shapes_are_those_of_the_served_models(model: str) -> None:
    config = json.loads((store.resolve(model) / "config.json").read_text("utf-8"))
    assert spec_of(model) == parse_spec(config)


# -- operands -----------------------------------------------------------------------------------


def test_copies_of_weights_fill_the_footprint_and_share_nothing(operands: Operands) -> None:
    part = WeightPart((1, 64, 64), WeightDtype.BF16)
    sets = operands.weights(part, part)
    starts = {weight.data.ctypes.data for copy in sets for weight in copy}
    assert len(starts) == 2 * len(sets)
    assert sum(weight.data.nbytes for copy in sets for weight in copy) >= FOOTPRINT
    first, last = (operands.ops.unpack(copy[0]) for copy in (sets[0], sets[-1]))
    np.testing.assert_array_equal(first, last)


@pytest.mark.parametrize("kv_dtype", [KVDtype.BF16, KVDtype.INT8])
def test_batches_fill_the_footprint_and_share_no_block(
    operands: Operands, kv_dtype: KVDtype
) -> None:
    spec = toy_spec_of(DENSE).attention
    kv, batches = operands.contexts(spec, StepShape(3, 2, 33), kv_dtype)
    assert (kv.scales is not None) == (kv_dtype is KVDtype.INT8)
    blocks = np.concatenate([batch.block_tables.ravel() for batch in batches])
    assert np.unique(blocks).size == blocks.size == kv.k.shape[0]
    assert kv.v is not None
    assert kv.k.nbytes + kv.v.nbytes + (0 if kv.scales is None else kv.scales.nbytes) >= FOOTPRINT
    assert batches[0].positions.tolist() == [31, 32] * 3
    slots = batches[0].slot_mapping.reshape(3, 2)
    assert (slots // 16 == batches[0].block_tables[:, [1, 2]]).all()
    assert (slots % 16 == [15, 0]).all()


def test_experts_that_nobody_chose_are_not_counted(operands: Operands) -> None:
    spec = toy_spec_of("qwen3-moe-random")
    assert spec.moe is not None
    case = next(expert_mlp(spec, TINY_SIZES))
    assert case.tokens == 1
    work = case.prepare(operands).work
    gate_up, down = operands.weights(
        *(WeightPart(shape, WeightDtype.BF16) for shape in ((8, 96, 64), (8, 64, 48)))
    )[0]
    share = spec.moe.gate.top_k / spec.moe.gate.num_experts
    assert work.memory_bytes == pytest.approx(share * (gate_up.data.nbytes + down.data.nbytes))
    assert work.operations == 2 * spec.moe.gate.top_k * 3 * 64 * 48


# -- bounds and times ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "bound", "seconds"),
    [
        (Work(memory_bytes=2e9, cache_bytes=1e9), "memory", 0.2),
        (Work(memory_bytes=1e9, cache_bytes=5e10), "cache", 0.5),
        (Work(1e9, 1e9, 3e11, WeightDtype.BF16), "compute", 3.0),
    ],
)
def test_the_longest_of_the_three_times_is_the_bound(
    work: Work, bound: str, seconds: float
) -> None:
    roof = Roof(
        threads=1, isa="avx2", memory_gb_per_s=10.0, cache_gb_per_s=100.0,
        gemm_gflop_per_s={"bf16": 100.0}, read_gb_per_s=10.0, call_us=1.0,
    )  # fmt: skip
    name, bound_s = roof.bound_of(work)
    assert (name, bound_s) == (bound, pytest.approx(seconds))


def test_calls_take_turns_in_their_order() -> None:
    called: list[int] = []
    side = Side([lambda i=i: called.append(i) for i in range(3)], Timing(turn_s=1e-6))
    for _ in range(2):
        side.take_turn()
    assert called == [i % 3 for i in range(len(called))]
    assert len(called) > 3
    assert len(side.seconds) == 2


def test_a_quick_run_measures_every_operator(capfd: pytest.CaptureFixture[str]) -> None:
    assert bench_ops.main(["--quick", "--no-torch", "--threads", "1", "--repeats", "1"]) == 0
    document = json.loads(capfd.readouterr().out.splitlines()[-1])
    results = document["results"]
    assert {result["operator"] for result in results} == operators_of_the_contract()
    assert {result["model"] for result in results} == set(MODELS)
    assert all(result["us"] > 0 and result["share"] > 0 for result in results)
    assert document["torch"] == "--no-torch"
    assert all(
        result["torch"] == {"us": None, "way": "", "reason": "no torch"} for result in results
    )


# -- torch --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operator",
    [
        "linear",
        "grouped_linear",
        "swiglu_mlp",
        "rms_norm",
        "add_rms_norm",
        "gate_topk",
        "expert_mlp",
        "routed_experts",
    ],
)
def test_torch_computes_the_same(operands: Operands, operator: str) -> None:
    module, reason = import_torch()
    if module is None:
        pytest.skip(reason)
    torch = TorchOperands(module, 1, 1)
    compared = 0
    for case in tiny_cases(operator):
        if case.torch is None or case.dtype == "int4":  # torch's int4 weights are random
            continue
        ours = case.prepare(operands).calls[0]()
        for calls in case.torch(torch).values():
            theirs = calls[0]()
            assert_close(ours, theirs)
            compared += 1
    assert compared > 0


def assert_close(ours: object, theirs: object) -> None:
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    for mine, other in pairs:
        values = other.float().numpy()
        if mine.ndim == 3:
            values = values.swapaxes(0, 1)
        limit = 0.05 * np.abs(values).max()
        np.testing.assert_allclose(mine, values, rtol=0, atol=limit)
