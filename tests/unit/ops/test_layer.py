"""A layer's parts as one operator: bit for bit what plain operators give in a row."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
import pytest

from tests.unit.ops.cases import make_paged, normal
from tests.unit.ops.layers import (
    DIM,
    EXPERTS,
    HEADS,
    HIDDEN,
    LENGTHS,
    MAX_POSITIONS,
    QUERY_RANK,
    RANK,
    ROPE_DIM,
    VALUE_DIM,
    assert_same,
    copy_of,
    make_gqa,
    make_mla,
    paged_for,
)
from xdeepserve.ops import (
    F32,
    AttentionBatch,
    AttentionLayer,
    GqaLayer,
    KVLayer,
    Ops,
    PackedWeight,
    WeightDtype,
    composed,
)
from xdeepserve.ops.composed import permute_by_expert
from xdeepserve.ops.cpu import CpuOps


class Maker(Protocol):
    """Makes a random layer."""

    def __call__(
        self, ops: Ops, rng: np.random.Generator, dtype: WeightDtype, *, plain: bool = False
    ) -> AttentionLayer: ...


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


MAKERS = [make_gqa, make_mla]


@pytest.mark.parametrize(
    ("make", "kv_dtype"),
    [(make, dtype) for make in MAKERS for dtype in (np.float32, np.uint16)] + [(make_gqa, np.int8)],
)
@pytest.mark.parametrize("dtype", list(WeightDtype))
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_layer_equals_its_operators(
    cpu: CpuOps,
    rng: np.random.Generator,
    make: Maker,
    dtype: WeightDtype,
    kv_dtype: type,
    plain: bool,
    is_first: bool,
) -> None:
    layer = make(cpu, rng, dtype, plain=plain)
    paged = paged_for(layer, rng, kv_dtype)
    residual = normal(rng, paged.num_tokens, HIDDEN)
    ffn_output = None if is_first else normal(rng, paged.num_tokens, HIDDEN)
    before, other = residual.copy(), copy_of(paged.kv)
    got = composed.attention_layer(cpu, layer, residual, ffn_output, paged.batch, paged.kv)
    compose = composed.gqa_layer if isinstance(layer, GqaLayer) else composed.mla_layer
    want = compose(cpu, layer, residual, ffn_output, paged.batch, other)  # type: ignore[arg-type]
    assert (got.topk_ids is None) == plain
    for mine, theirs in zip(got, want, strict=True):
        if theirs is None:
            assert mine is None
        else:
            np.testing.assert_array_equal(mine, theirs)
    assert_same(paged.kv, other)
    np.testing.assert_array_equal(residual, before)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_a_layer_of_few_tokens(
    cpu: CpuOps, rng: np.random.Generator, make: Maker, num_tokens: int
) -> None:
    layer = make(cpu, rng, WeightDtype.INT8)
    paged = paged_for(layer, rng)
    rows, batch = paged.alone(0)
    if num_tokens == 0:
        none = np.zeros(0, np.int32)
        batch = AttentionBatch(np.zeros(1, np.int32), none, none[:, None], none, none)
        rows = slice(0, 0)
    residual = normal(rng, paged.num_tokens, HIDDEN)
    whole = composed.attention_layer(cpu, layer, residual, None, paged.batch, copy_of(paged.kv))
    got = composed.attention_layer(cpu, layer, residual[rows], None, batch, paged.kv)
    assert got.residual.shape == (num_tokens, HIDDEN)
    np.testing.assert_array_equal(got.hidden_states, whole.hidden_states[rows])


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("block_tables", 10_000, "block_tables names 10000, a block that the cache lacks"),
        ("block_tables", -1, "block_tables"),
        ("slot_mapping", 10_000_000, "slot_mapping names 10000000, a slot outside the cache"),
        ("slot_mapping", -1, "slot_mapping"),
        ("positions", 200, "positions names 200, a row outside the rope table"),
        ("seq_lens", 0, "seq_lens"),
    ],
)
def test_a_batch_that_leaves_the_cache_is_refused(
    cpu: CpuOps, rng: np.random.Generator, make: Maker, field: str, value: int, message: str
) -> None:
    layer = make(cpu, rng, WeightDtype.FLOAT32)
    paged = paged_for(layer, rng)
    entries = getattr(paged.batch, field).copy()
    entries.flat[0] = value
    batch = dataclasses.replace(paged.batch, **{field: entries})
    residual = normal(rng, paged.num_tokens, HIDDEN)
    with pytest.raises(ValueError, match=message):
        composed.attention_layer(cpu, layer, residual, None, batch, paged.kv)


@pytest.mark.parametrize("make", MAKERS)
def test_rows_and_cache_must_fit_the_layer(
    cpu: CpuOps, rng: np.random.Generator, make: Maker
) -> None:
    layer = make(cpu, rng, WeightDtype.FLOAT32)
    paged = paged_for(layer, rng)
    residual = normal(rng, paged.num_tokens, HIDDEN)

    def run(residual: F32, ffn_output: F32 | None, kv: KVLayer) -> None:
        composed.attention_layer(cpu, layer, residual, ffn_output, paged.batch, kv)

    with pytest.raises(ValueError, match="residual must be"):
        run(residual[:-1], None, paged.kv)
    with pytest.raises(ValueError, match="residual must be"):
        run(normal(rng, paged.num_tokens, HIDDEN + 1), None, paged.kv)
    with pytest.raises(ValueError, match="ffn_output must be"):
        run(residual, residual[:-1], paged.kv)
    (other,) = (maker for maker in MAKERS if maker is not make)
    with pytest.raises(ValueError, match=r"value cache|from the latents"):
        run(residual, None, paged_for(other(cpu, rng, WeightDtype.FLOAT32), rng).kv)
    dim = DIM + 1 if isinstance(layer, GqaLayer) else RANK + ROPE_DIM + 1
    wide = make_paged(rng, LENGTHS, heads=paged.kv.k.shape[1], dim=dim, latent=make is make_mla)
    with pytest.raises(ValueError, match=r"head size|latent plus rope size"):
        run(residual, None, wide.kv)


@pytest.mark.parametrize(
    ("field", "shape", "message"),
    [
        ("latents", (30, HIDDEN + 1), "inputs of latents is 41; it must be 40"),
        ("latents", (RANK + ROPE_DIM, HIDDEN), "latents must have rows for queries"),
        ("query", (96, QUERY_RANK + 1), "inputs of the query is 21; it must be 20"),
        ("query", (95, QUERY_RANK), "output features of the query is 95; it must be 96"),
        ("value_absorb", (HEADS - 1, VALUE_DIM, RANK), "heads of value_absorb is 5"),
        ("value_absorb", (HEADS, VALUE_DIM, RANK - 1), "inputs of value_absorb is 23"),
        ("output", (HIDDEN + 1, HEADS * VALUE_DIM), "output features of the output projection"),
        ("output", (HIDDEN, HEADS * VALUE_DIM + 1), "inputs of the output projection"),
        ("latent_norm", (RANK + 1,), "length of the latent norm"),
        ("query_norm", (QUERY_RANK + 1,), "length of the query norm"),
        ("latents_bias", (3,), "length of the latents' bias"),
        ("output_bias", (3,), "length of the output bias"),
        ("query", None, "a query and its norm go together"),
        ("query_norm", None, "a query and its norm go together"),
        ("rope", (MAX_POSITIONS, 5), "rotary_dim must be even"),
    ],
)
def test_a_latent_layer_of_odd_parts_is_refused(
    cpu: CpuOps,
    rng: np.random.Generator,
    field: str,
    shape: tuple[int, ...] | None,
    message: str,
) -> None:
    layer = make_mla(cpu, rng, WeightDtype.BF16)
    part: object = None if shape is None else normal(rng, *shape)
    if shape is not None and isinstance(getattr(layer, field), PackedWeight):
        part = cpu.pack(normal(rng, *shape), dtype=WeightDtype.BF16)
    broken = dataclasses.replace(layer, **{field: part})  # type: ignore[arg-type]
    paged = paged_for(layer, rng)
    with pytest.raises(ValueError, match=message):
        cpu.mla_layer(broken, normal(rng, paged.num_tokens, HIDDEN), None, paged.batch, paged.kv)


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
