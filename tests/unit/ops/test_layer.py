"""A layer's parts as one operator: bit for bit what plain operators give in a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from tests.unit.ops.cases import Paged, make_paged, normal, rope_table
from xdeepserve.ops import (
    F32,
    AttentionOutput,
    GateSpec,
    GqaLayer,
    LayerFrame,
    Ops,
    QKNorm,
    Router,
    WeightDtype,
    composed,
)
from xdeepserve.ops.composed import permute_by_expert
from xdeepserve.ops.cpu import CpuOps

HIDDEN, HEADS, KV_HEADS, DIM, EXPERTS = 40, 6, 2, 16, 8
LENGTHS = [(1, 1), (3, 20), (1, 65), (30, 40), (1, 90)]


def test_permutation_is_stable_and_counts() -> None:
    topk_ids = np.array([[2, 0], [0, 2], [3, 0]], np.int32)
    permutation = permute_by_expert(topk_ids, 4)
    assert permutation.num_tokens_per_expert.tolist() == [3, 0, 2, 1]
    assert permutation.token_of_row.tolist() == [0, 1, 2, 0, 1, 2]
    assert permutation.row_of_slot.tolist() == [[3, 0], [1, 4], [5, 2]]


def test_skipped_slots_have_no_row() -> None:
    permutation = permute_by_expert(np.array([[-1, 1], [-1, -1]], np.int32), 2)
    assert permutation.num_tokens_per_expert.tolist() == [0, 1]
    assert permutation.token_of_row.tolist() == [0]
    assert permutation.row_of_slot.tolist() == [[-1, 0], [-1, -1]]


def test_every_slot_finds_its_own_token_and_expert() -> None:
    rng = np.random.default_rng(1)
    topk_ids = rng.integers(-1, 7, (50, 3)).astype(np.int32)
    permutation = permute_by_expert(topk_ids, 7)
    expert_of_row = np.repeat(np.arange(7), permutation.num_tokens_per_expert)
    for (token, slot), expert in np.ndenumerate(topk_ids):
        row = permutation.row_of_slot[token, slot]
        if expert >= 0:
            assert (permutation.token_of_row[row], expert_of_row[row]) == (token, expert)
        else:
            assert row == -1
    used = permutation.row_of_slot[topk_ids >= 0]
    assert sorted(used.tolist()) == list(range(len(expert_of_row)))


def make_layer(
    ops: Ops, rng: np.random.Generator, dtype: WeightDtype, *, plain: bool = False
) -> GqaLayer:
    """With all that a layer may have, or nothing of it."""
    width = (HEADS + 2 * KV_HEADS) * DIM
    router = Router(
        ops.pack(normal(rng, EXPERTS, HIDDEN), dtype=WeightDtype.FLOAT32),
        normal(rng, EXPERTS),
        GateSpec(EXPERTS, 3, "sigmoid", renormalize=True, num_groups=2, topk_groups=1),
    )
    norm = QKNorm(normal(rng, DIM), normal(rng, DIM), 1e-6)
    frame = LayerFrame(normal(rng, HIDDEN), normal(rng, HIDDEN), 1e-5, None if plain else router)
    return GqaLayer(
        frame=frame,
        qkv=ops.pack(normal(rng, width, HIDDEN), dtype=dtype),
        qkv_bias=None if plain else normal(rng, width),
        output=ops.pack(normal(rng, HIDDEN, HEADS * DIM), dtype=dtype),
        output_bias=None if plain else normal(rng, HIDDEN),
        norm=None if plain else norm,
        rope=rope_table(rng, 200, 8),
        num_heads=HEADS,
        scale=0.25,
    )


def run_in(
    paged: Paged, run: Callable[[Paged], AttentionOutput]
) -> tuple[AttentionOutput, F32, F32]:
    """The output, and the cache afterwards; `paged` itself stays as it is."""
    assert paged.kv.v is not None
    kv = dataclasses.replace(paged.kv, k=paged.kv.k.copy(), v=paged.kv.v.copy())
    output = run(dataclasses.replace(paged, kv=kv))
    return output, kv.k, kv.v


@pytest.mark.parametrize("dtype", list(WeightDtype))
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_layer_equals_its_operators(
    cpu: CpuOps, rng: np.random.Generator, dtype: WeightDtype, plain: bool, is_first: bool
) -> None:
    layer = make_layer(cpu, rng, dtype, plain=plain)
    paged = make_paged(rng, LENGTHS, heads=KV_HEADS, dim=DIM)
    residual = normal(rng, paged.num_tokens, HIDDEN)
    before = residual.copy()
    ffn_output = None if is_first else normal(rng, paged.num_tokens, HIDDEN)
    got = run_in(paged, lambda p: cpu.gqa_layer(layer, residual, ffn_output, p.batch, p.kv))
    want = run_in(
        paged, lambda p: composed.gqa_layer(cpu, layer, residual, ffn_output, p.batch, p.kv)
    )
    for mine, theirs in zip(got[0], want[0], strict=True):
        if plain and theirs is None:
            assert mine is None
        else:
            np.testing.assert_array_equal(mine, theirs)
    for mine, theirs in zip(got[1:], want[1:], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(residual, before)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("block_tables", 10_000, "a block that the cache lacks"),
        ("block_tables", -1, "block_tables"),
        ("slot_mapping", 10_000_000, "outside the cache"),
        ("slot_mapping", -1, "slot_mapping"),
        ("positions", 200, "outside the rope table"),
        ("seq_lens", 0, "seq_lens"),
    ],
)
def test_a_batch_that_leaves_the_cache_is_refused(
    cpu: CpuOps, rng: np.random.Generator, field: str, value: int, message: str
) -> None:
    layer = make_layer(cpu, rng, WeightDtype.FLOAT32)
    paged = make_paged(rng, LENGTHS, heads=KV_HEADS, dim=DIM)
    entries = getattr(paged.batch, field).copy()
    entries.flat[0] = value
    batch = dataclasses.replace(paged.batch, **{field: entries})
    residual = normal(rng, paged.num_tokens, HIDDEN)
    with pytest.raises(ValueError, match=message):
        cpu.gqa_layer(layer, residual, None, batch, paged.kv)


@pytest.mark.parametrize("rows", [0, 1, 7, 60])
@pytest.mark.parametrize("dtype", list(WeightDtype))
def test_routed_experts_equal_their_operators(
    cpu: CpuOps, rng: np.random.Generator, rows: int, dtype: WeightDtype
) -> None:
    gate_up = cpu.pack(normal(rng, EXPERTS, 48, HIDDEN), dtype=dtype)
    down = cpu.pack(normal(rng, EXPERTS, HIDDEN, 24), dtype=dtype)
    x = normal(rng, rows, HIDDEN)
    ids = rng.integers(-1, EXPERTS, (rows, 3)).astype(np.int32)
    weights = rng.random((rows, 3), np.float32)
    got = cpu.routed_experts(x, ids, weights, gate_up, down)
    want = composed.routed_experts(cpu, x, ids, weights, gate_up, down)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("expert", [-2, EXPERTS])
def test_an_unknown_expert_is_refused(cpu: CpuOps, rng: np.random.Generator, expert: int) -> None:
    gate_up = cpu.pack(normal(rng, EXPERTS, 48, HIDDEN), dtype=WeightDtype.BF16)
    down = cpu.pack(normal(rng, EXPERTS, HIDDEN, 24), dtype=WeightDtype.BF16)
    ids = np.full((1, 1), expert, np.int32)
    with pytest.raises(ValueError, match="topk_ids"):
        cpu.routed_experts(normal(rng, 1, HIDDEN), ids, np.ones((1, 1), np.float32), gate_up, down)
