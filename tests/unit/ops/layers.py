"""Random layers, with all that a layer may have or nothing of it."""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.unit.ops.cases import Paged, make_paged, normal, rope_table
from xdeepserve.ops import (
    Array,
    AttentionLayer,
    DecoderLayer,
    GateSpec,
    GqaLayer,
    KVLayer,
    LayerFrame,
    MlaLayer,
    Mlp,
    Ops,
    QKNorm,
    Router,
    WeightDtype,
)

HIDDEN, HEADS, EXPERTS, MAX_POSITIONS = 40, 6, 8, 200
KV_HEADS, DIM = 2, 16
RANK, PLAIN_DIM, ROPE_DIM, VALUE_DIM, QUERY_RANK = 24, 10, 6, 14, 20
LENGTHS = [(1, 1), (3, 20), (1, 65), (30, 40), (1, 90)]
"""(new tokens, context) of each sequence: some decode, some are prefilled."""


def make_frame(ops: Ops, rng: np.random.Generator, *, routed: bool) -> LayerFrame:
    router = Router(
        ops.pack(normal(rng, EXPERTS, HIDDEN), dtype=WeightDtype.FLOAT32),
        normal(rng, EXPERTS),
        GateSpec(EXPERTS, 3, "sigmoid", renormalize=True, num_groups=2, topk_groups=1),
    )
    return LayerFrame(normal(rng, HIDDEN), normal(rng, HIDDEN), 1e-5, router if routed else None)


def make_gqa(
    ops: Ops, rng: np.random.Generator, dtype: WeightDtype, *, plain: bool = False
) -> GqaLayer:
    width = (HEADS + 2 * KV_HEADS) * DIM
    norm = QKNorm(normal(rng, DIM), normal(rng, DIM), 1e-6)
    return GqaLayer(
        frame=make_frame(ops, rng, routed=not plain),
        qkv=ops.pack(normal(rng, width, HIDDEN), dtype=dtype),
        qkv_bias=None if plain else normal(rng, width),
        output=ops.pack(normal(rng, HIDDEN, HEADS * DIM), dtype=dtype),
        output_bias=None if plain else normal(rng, HIDDEN),
        norm=None if plain else norm,
        rope=rope_table(rng, MAX_POSITIONS, 8),
        num_heads=HEADS,
        scale=0.25,
    )


def make_mla(
    ops: Ops, rng: np.random.Generator, dtype: WeightDtype, *, plain: bool = False
) -> MlaLayer:
    heads = HEADS * (PLAIN_DIM + ROPE_DIM)
    width = (heads if plain else QUERY_RANK) + RANK + ROPE_DIM
    return MlaLayer(
        frame=make_frame(ops, rng, routed=not plain),
        latents=ops.pack(normal(rng, width, HIDDEN), dtype=dtype),
        latents_bias=None if plain else normal(rng, width),
        query=None if plain else ops.pack(normal(rng, heads, QUERY_RANK), dtype=dtype),
        query_norm=None if plain else normal(rng, QUERY_RANK),
        latent_norm=normal(rng, RANK),
        norm_eps=1e-6,
        key_absorb=ops.pack(normal(rng, HEADS, RANK, PLAIN_DIM), dtype=dtype),
        value_absorb=ops.pack(normal(rng, HEADS, VALUE_DIM, RANK), dtype=dtype),
        output=ops.pack(normal(rng, HIDDEN, HEADS * VALUE_DIM), dtype=dtype),
        output_bias=None if plain else normal(rng, HIDDEN),
        rope=rope_table(rng, MAX_POSITIONS, ROPE_DIM),
        scale=0.25,
    )


def make_mlp(
    ops: Ops, rng: np.random.Generator, dtype: WeightDtype, *, groups: int = 1, width: int = HIDDEN
) -> Mlp:
    return Mlp(
        ops.pack(normal(rng, groups, 48, width), dtype=dtype),
        ops.pack(normal(rng, groups, width, 24), dtype=dtype),
    )


def make_decoder_layer(
    ops: Ops,
    rng: np.random.Generator,
    attention: AttentionLayer,
    dtype: WeightDtype,
    *,
    shared: bool = True,
) -> DecoderLayer:
    """`attention` and what its router asks for; with or without shared experts."""
    if attention.frame.router is None:
        return DecoderLayer(attention, make_mlp(ops, rng, dtype), None)
    ffn = make_mlp(ops, rng, dtype) if shared else None
    return DecoderLayer(attention, ffn, make_mlp(ops, rng, dtype, groups=EXPERTS))


def paged_for(layer: AttentionLayer, rng: np.random.Generator, dtype: type = np.float32) -> Paged:
    """LENGTHS over a cache of the layer's kind."""
    if isinstance(layer, GqaLayer):
        return make_paged(rng, LENGTHS, heads=KV_HEADS, dim=DIM, dtype=dtype)
    dim = RANK + ROPE_DIM
    return make_paged(rng, LENGTHS, heads=1, dim=dim, dtype=dtype, latent=True)


def copy_of(kv: KVLayer) -> KVLayer:
    """Another cache with the same contents."""
    return dataclasses.replace(kv, k=kv.k.copy(), v=_copy(kv.v), scales=_copy(kv.scales))


def _copy(array: Array | None) -> Array | None:
    return None if array is None else array.copy()


def assert_same(got: KVLayer, want: KVLayer) -> None:
    """Bit for bit."""
    np.testing.assert_array_equal(got.k, want.k)
    for mine, theirs in ((got.v, want.v), (got.scales, want.scales)):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            np.testing.assert_array_equal(mine, theirs)
