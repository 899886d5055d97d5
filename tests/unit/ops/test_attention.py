"""Rotation, cache writes and attention: native against reference, and law 1."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.unit.ops.cases import (
    ISAS,
    Paged,
    make_cpu,
    make_paged,
    normal,
    rope_table,
    stored_layer,
)
from xdeepserve.ops import F32, AttentionBatch, KVLayer, QKNorm
from xdeepserve.ops.cpu import CpuOps
from xdeepserve.ops.quant import from_bf16, to_bf16
from xdeepserve.ops.reference import ReferenceOps

DTYPES = [np.float32, np.uint16]
KV_DTYPES = [*DTYPES, np.int8]
LENGTHS = [(1, 1), (3, 20), (1, 64), (1, 65), (40, 40), (0, 9), (17, 150), (1, 300), (5, 600)]


def _multiplies_bf16(cpu: CpuOps, dtype: type) -> bool:
    """Whether queries and softmax weights are rounded to bf16."""
    return cpu.isa in ("avx512", "amx") and dtype is not np.float32


def _as_read(cpu: CpuOps, q: F32, dtype: type) -> F32:
    """Queries as they are multiplied."""
    return from_bf16(to_bf16(q)) if _multiplies_bf16(cpu, dtype) else q


def _assert_close(cpu: CpuOps, dtype: type, got: F32, want: F32) -> None:
    """To float32 rounding; that of bf16 weights is 2^-8 of values below 4."""
    is_rounded = _multiplies_bf16(cpu, dtype)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=4 / 256 if is_rounded else 2e-6)
    if is_rounded:  # errors of many weights cancel
        assert float(np.sqrt(np.mean((got - want) ** 2))) < 1.5e-3


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("heads", [(1, 1, 8), (6, 2, 64), (9, 3, 21), (4, 1, 16)])
def test_paged_attention_agrees_with_reference(
    cpu: CpuOps,
    reference: ReferenceOps,
    rng: np.random.Generator,
    heads: tuple[int, int, int],
    dtype: type,
) -> None:
    num_heads, kv_heads, dim = heads
    paged = make_paged(rng, LENGTHS, heads=kv_heads, dim=dim, dtype=dtype)
    q = normal(rng, paged.num_tokens, num_heads, dim)
    got = cpu.paged_attention(q, paged.batch, paged.kv, scale=0.3)
    want = reference.paged_attention(_as_read(cpu, q, dtype), paged.batch, paged.kv, scale=0.3)
    _assert_close(cpu, dtype, got, want)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_attention_row_does_not_depend_on_its_batch(
    cpu: CpuOps, rng: np.random.Generator, dtype: type
) -> None:
    paged = make_paged(rng, LENGTHS, heads=2, dim=24, dtype=dtype)
    q = normal(rng, paged.num_tokens, 6, 24)
    together = cpu.paged_attention(q, paged.batch, paged.kv, scale=0.2)
    for b in range(len(LENGTHS)):
        rows, batch = paged.alone(b)
        alone = cpu.paged_attention(q[rows], batch, paged.kv, scale=0.2)
        np.testing.assert_array_equal(alone, together[rows])


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 100])
def test_attention_does_not_depend_on_chunking(
    cpu: CpuOps, rng: np.random.Generator, chunk: int, dtype: type
) -> None:
    paged = make_paged(rng, [(160, 400)], heads=1, dim=16, dtype=dtype)
    q = normal(rng, 160, 3, 16)
    whole = cpu.paged_attention(q, paged.batch, paged.kv, scale=0.25)
    for start in range(0, 160, chunk):
        rows = slice(start, min(start + chunk, 160))
        batch = _one_chunk(paged.batch, rows)
        part = cpu.paged_attention(q[rows], batch, paged.kv, scale=0.25)
        np.testing.assert_array_equal(part, whole[rows])


def _one_chunk(batch: AttentionBatch, rows: slice) -> AttentionBatch:
    return AttentionBatch(
        query_start=np.array([0, rows.stop - rows.start], np.int32),
        seq_lens=batch.seq_lens - (int(batch.query_start[-1]) - rows.stop),
        block_tables=batch.block_tables,
        positions=batch.positions[rows],
        slot_mapping=batch.slot_mapping[rows],
    )


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_future_positions_of_the_same_sequence_do_not_leak(
    cpu: CpuOps, rng: np.random.Generator, dtype: type
) -> None:
    paged = make_paged(rng, [(30, 90)], heads=1, dim=16, dtype=dtype)
    q = normal(rng, 30, 2, 16)
    before = cpu.paged_attention(q, paged.batch, paged.kv, scale=0.25)
    assert paged.kv.v is not None
    block = paged.batch.block_tables[0, 5]
    if paged.kv.scales is not None:
        paged.kv.scales[block, :, :, 9] = np.nan  # position 89
    else:
        nan = np.nan if dtype is np.float32 else to_bf16(np.full((), np.nan, np.float32))
        paged.kv.k[block, :, :, 9] = paged.kv.v[block, :, 9] = nan
    after = cpu.paged_attention(q, paged.batch, paged.kv, scale=0.25)
    np.testing.assert_array_equal(after[:29], before[:29])
    assert np.isnan(after[29]).all()


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("block_size", [1, 5, 32])
def test_attention_does_not_depend_on_block_size(
    cpu: CpuOps, rng: np.random.Generator, block_size: int, dtype: type
) -> None:
    results = []
    q = normal(rng, 9, 4, 20)
    for size in (16, block_size):
        same = np.random.default_rng(5)
        paged = make_paged(same, [(9, 77)], heads=2, dim=20, block_size=size)
        paged = _filled(paged, np.random.default_rng(6), length=77, dtype=dtype)
        results.append(cpu.paged_attention(q, paged.batch, paged.kv, scale=0.2))
        one_row = _one_chunk(paged.batch, slice(8, 9))
        alone = cpu.paged_attention(q[8:], one_row, paged.kv, scale=0.2)
        np.testing.assert_array_equal(alone, results[-1][8:])
    np.testing.assert_array_equal(results[0], results[1])


def _filled(paged: Paged, rng: np.random.Generator, *, length: int, dtype: type) -> Paged:
    """The same batch over keys and values that do not depend on the block size."""
    assert paged.kv.v is not None
    shape, block_size = paged.kv.v.shape, paged.kv.block_size
    keys, values = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    for position in range(length):
        block, row = paged.batch.block_tables[0, position // block_size], position % block_size
        keys[block, :, row], values[block, :, row] = normal(rng, 2, 20), normal(rng, 2, 20)
    return Paged(paged.batch, stored_layer(keys, values, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 8, 5), (48, 16, 16), (64, 32, 35)])
def test_mla_attention_agrees_with_reference_and_with_itself_alone(
    cpu: CpuOps,
    reference: ReferenceOps,
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    dtype: type,
) -> None:
    rank, rope_dim, num_heads = shape
    paged = make_paged(rng, LENGTHS, heads=1, dim=rank + rope_dim, dtype=dtype, latent=True)
    q_latent = normal(rng, paged.num_tokens, num_heads, rank)
    q_rope = normal(rng, paged.num_tokens, num_heads, rope_dim)
    got = cpu.mla_attention(q_latent, q_rope, paged.batch, paged.kv, scale=0.1)
    want = reference.mla_attention(
        _as_read(cpu, q_latent, dtype),
        _as_read(cpu, q_rope, dtype),
        paged.batch,
        paged.kv,
        scale=0.1,
    )
    _assert_close(cpu, dtype, got, want)
    rows, batch = paged.alone(6)
    alone = cpu.mla_attention(q_latent[rows], q_rope[rows], batch, paged.kv, scale=0.1)
    np.testing.assert_array_equal(alone, got[rows])


def test_many_heads_over_one_latent(
    cpu: CpuOps, reference: ReferenceOps, rng: np.random.Generator
) -> None:
    paged = make_paged(rng, [(2, 70)], heads=1, dim=24, latent=True)
    q_latent, q_rope = normal(rng, 2, 300, 16), normal(rng, 2, 300, 8)
    got = cpu.mla_attention(q_latent, q_rope, paged.batch, paged.kv, scale=0.1)
    want = reference.mla_attention(q_latent, q_rope, paged.batch, paged.kv, scale=0.1)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_thread_count_does_not_touch_bits(rng: np.random.Generator, isa: str, dtype: type) -> None:
    paged = make_paged(rng, LENGTHS, heads=2, dim=24, dtype=dtype)
    q = normal(rng, paged.num_tokens, 6, 24)
    one, two, three = (
        make_cpu(isa=isa, num_threads=n).paged_attention(q, paged.batch, paged.kv, scale=0.2)
        for n in (1, 2, 3)
    )
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("rotary", [(16, 16), (16, 8), (21, 10), (10, 0)])
@pytest.mark.parametrize("with_norm", [False, True])
def test_rope_kv_write_agrees_with_reference(
    cpu: CpuOps,
    reference: ReferenceOps,
    rng: np.random.Generator,
    rotary: tuple[int, int],
    with_norm: bool,
    dtype: type,
) -> None:
    dim, rotary_dim = rotary
    paged = make_paged(rng, [(5, 20), (1, 33), (0, 3)], heads=2, dim=dim, dtype=dtype)
    other = dataclasses.replace(
        paged.kv,
        k=paged.kv.k.copy(),
        v=None if paged.kv.v is None else paged.kv.v.copy(),
        scales=None if paged.kv.scales is None else paged.kv.scales.copy(),
    )
    qkv = normal(rng, 6, (4 + 4) * dim)
    table = rope_table(rng, 40, rotary_dim)
    norm = QKNorm(normal(rng, dim), normal(rng, dim), 1e-6) if with_norm else None
    got = cpu.rope_kv_write(qkv, table, paged.batch, paged.kv, num_heads=4, norm=norm)
    want = reference.rope_kv_write(qkv, table, paged.batch, other, num_heads=4, norm=norm)
    assert paged.kv.v is not None
    assert other.v is not None
    np.testing.assert_array_equal(paged.kv.v, other.v)
    if paged.kv.scales is not None:
        np.testing.assert_allclose(paged.kv.scales, other.scales, rtol=1e-5)
    if with_norm:  # the sum of squares is taken in another order
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        if dtype is np.float32:
            np.testing.assert_allclose(paged.kv.k, other.k, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(paged.kv.k, other.k)


def test_rope_leaves_the_tail_of_a_head_alone(cpu: CpuOps, rng: np.random.Generator) -> None:
    x, table = normal(rng, 3, 2, 12), rope_table(rng, 7, 8)
    positions = np.array([0, 6, 2], np.int32)
    out = cpu.rope(x, table, positions)
    np.testing.assert_array_equal(out[..., 8:], x[..., 8:])
    assert not np.array_equal(out[..., :8], x[..., :8])
    np.testing.assert_array_equal(out, ReferenceOps().rope(x, table, positions))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mla_kv_write_agrees_with_reference(
    cpu: CpuOps, reference: ReferenceOps, rng: np.random.Generator, dtype: type
) -> None:
    paged = make_paged(rng, [(4, 18), (1, 2)], heads=1, dim=28, dtype=dtype, latent=True)
    other = KVLayer(paged.kv.k.copy(), None)
    latent, k_rope = normal(rng, 5, 20), normal(rng, 5, 8)
    cpu.mla_kv_write(latent, k_rope, paged.batch, paged.kv)
    reference.mla_kv_write(latent, k_rope, paged.batch, other)
    np.testing.assert_array_equal(paged.kv.k, other.k)


def test_nothing_outside_the_cache_can_be_named(cpu: CpuOps, rng: np.random.Generator) -> None:
    paged = make_paged(rng, [(2, 20)], heads=1, dim=8)
    q = normal(rng, 2, 2, 8)
    batch = paged.batch

    def attend(**changes: object) -> None:
        changed = dataclasses.replace(batch, **changes)  # type: ignore[arg-type]
        cpu.paged_attention(q, changed, paged.kv, scale=1.0)

    blocks = paged.kv.k.shape[0]
    with pytest.raises(ValueError, match="block_tables"):
        attend(block_tables=np.full_like(batch.block_tables, blocks))
    with pytest.raises(ValueError, match="block_tables"):
        attend(block_tables=np.full_like(batch.block_tables, -1))
    with pytest.raises(ValueError, match="too short"):
        attend(seq_lens=np.array([1000], np.int32))
    with pytest.raises(ValueError, match="seq_lens"):
        attend(seq_lens=np.array([1], np.int32))
    with pytest.raises(ValueError, match="query_start"):
        attend(query_start=np.array([0, 1], np.int32))
    with pytest.raises(ValueError, match="query_start"):
        attend(query_start=np.array([1, 2], np.int32))


@pytest.mark.parametrize("scale", [0.0, -0.1, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_is_refused(
    cpu: CpuOps, rng: np.random.Generator, scale: float
) -> None:
    paged = make_paged(rng, [(1, 3)], heads=1, dim=8)
    with pytest.raises(ValueError, match="finite and above"):
        cpu.paged_attention(normal(rng, 1, 1, 8), paged.batch, paged.kv, scale=scale)


def test_bad_slots_and_positions_are_refused(cpu: CpuOps, rng: np.random.Generator) -> None:
    paged = make_paged(rng, [(2, 20)], heads=1, dim=8)
    qkv, table = normal(rng, 2, 4 * 8), rope_table(rng, 30, 8)
    for field, value in (("slot_mapping", -1), ("slot_mapping", 10**6), ("positions", 30)):
        changed = dataclasses.replace(paged.batch, **{field: np.array([0, value], np.int32)})
        with pytest.raises(ValueError, match=field):
            cpu.rope_kv_write(qkv, table, changed, paged.kv, num_heads=2)


def test_caches_are_of_keys_and_values_or_of_latents(cpu: CpuOps, rng: np.random.Generator) -> None:
    paged = make_paged(rng, [(2, 20)], heads=1, dim=8)
    latents = make_paged(rng, [(2, 20)], heads=1, dim=8, latent=True)
    q, qkv, table = normal(rng, 2, 2, 8), normal(rng, 2, 4 * 8), rope_table(rng, 30, 8)
    parts = normal(rng, 2, 2, 6), normal(rng, 2, 2, 2)
    with pytest.raises(ValueError, match="needs a value cache"):
        cpu.paged_attention(q, latents.batch, latents.kv, scale=1.0)
    with pytest.raises(ValueError, match="needs a value cache"):
        cpu.rope_kv_write(qkv, table, latents.batch, latents.kv, num_heads=2)
    with pytest.raises(ValueError, match="from the latents"):
        cpu.mla_attention(*parts, paged.batch, paged.kv, scale=1.0)
    with pytest.raises(ValueError, match="from the latents"):
        cpu.mla_kv_write(*(part[:, 0].copy() for part in parts), paged.batch, paged.kv)


def test_rows_are_those_of_the_batch(cpu: CpuOps, rng: np.random.Generator) -> None:
    paged = make_paged(rng, [(2, 20)], heads=1, dim=8)
    latents = make_paged(rng, [(2, 20)], heads=1, dim=8, latent=True)
    qkv, table = normal(rng, 3, 4 * 8), rope_table(rng, 30, 8)
    parts = normal(rng, 3, 2, 6), normal(rng, 3, 2, 2)
    with pytest.raises(ValueError, match="rows of q is 3; it must be 2"):
        cpu.paged_attention(normal(rng, 3, 2, 8), paged.batch, paged.kv, scale=1.0)
    with pytest.raises(ValueError, match="rows of qkv is 3; it must be 2"):
        cpu.rope_kv_write(qkv, table, paged.batch, paged.kv, num_heads=2)
    with pytest.raises(ValueError, match="rows of q_latent is 3; it must be 2"):
        cpu.mla_attention(*parts, latents.batch, latents.kv, scale=1.0)
    with pytest.raises(ValueError, match="rows of latent is 3; it must be 2"):
        cpu.mla_kv_write(*(part[:, 0].copy() for part in parts), latents.batch, latents.kv)


def test_read_only_cache_is_not_written(cpu: CpuOps, rng: np.random.Generator) -> None:
    paged = make_paged(rng, [(2, 20)], heads=1, dim=8)
    paged.kv.k.flags.writeable = False
    with pytest.raises(TypeError):
        cpu.rope_kv_write(
            normal(rng, 2, 4 * 8), rope_table(rng, 30, 8), paged.batch, paged.kv, num_heads=2
        )
