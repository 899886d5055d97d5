"""Operands of the cases: so many copies of weights and caches that all come from memory.

Calls of a case take the copies in turn. A copy is read again after `footprint` other bytes, by when
no cache holds it any more. Activations are the same in every call and lie in a cache, as they do in
a step, where the operator before has just written them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from xdeepserve.models.huge_pages import huge_zeros
from xdeepserve.models.kv_cache import KVDtype
from xdeepserve.models.rope import rope_table
from xdeepserve.models.spec import GqaSpec, MlaSpec
from xdeepserve.ops import (
    F32,
    I32,
    Array,
    AttentionBatch,
    GateSpec,
    KVLayer,
    PackedWeight,
    WeightDtype,
)
from xdeepserve.ops.cpu import CpuOps
from xdeepserve.ops.cpu_views import batch_view
from xdeepserve.ops.quant import to_bf16

BLOCK_SIZE: Final = 16
"""Tokens of a KV block, as served by default."""

NUM_VALUES: Final = (1 << 20) + 7
"""Random numbers that are repeated to fill an array; odd, so that rows differ."""

NUM_CHOICES: Final = 8
"""Different choices of experts, or of token ids, in turn."""


class WeightPart(NamedTuple):
    """A weight [G, N, K] before it is packed."""

    shape: tuple[int, int, int]
    dtype: WeightDtype


@dataclass(frozen=True, slots=True)
class StepShape:
    """Equal sequences of one step.

    Attributes:
        num_sequences: in the batch.
        new_tokens: of each sequence in this step; 1 = decode.
        context: tokens of each sequence, the new ones included.
    """

    num_sequences: int
    new_tokens: int
    context: int

    @property
    def num_tokens(self) -> int:
        """T of the step."""
        return self.num_sequences * self.new_tokens

    @property
    def cached_tokens(self) -> int:
        """Tokens of all contexts."""
        return self.num_sequences * self.context

    @property
    def visible_positions(self) -> int:
        """Positions that a query sees, added up over the queries."""
        first = self.context - self.new_tokens + 1
        return self.num_sequences * self.new_tokens * (first + self.context) // 2


class Operands:
    """Makes operands; those of the case before are overwritten. Thread: one.

    Args:
        footprint: bytes that no cache holds.
    """

    def __init__(self, ops: CpuOps, footprint: int) -> None:
        self.ops = ops
        self.footprint = footprint
        self.rng = np.random.default_rng(0)
        self._values = self.rng.standard_normal(NUM_VALUES, dtype=np.float32)
        self._packed = np.empty(0, np.uint8)
        self._parts: tuple[WeightPart, ...] = ()
        self._sets: list[tuple[PackedWeight, ...]] = []
        self._cached = np.empty(0, np.uint16)
        self._ropes: dict[tuple[object, int], F32] = {}

    def values(self, *shape: int) -> F32:
        """Normally distributed."""
        return np.resize(self._values, shape)

    def bits(self, *shape: int) -> Array:
        """`values` as bfloat16 bits."""
        return np.resize(to_bf16(self._values), shape)

    def ids(self, count: int, stop: int) -> I32:
        """[count] ids in [0, stop)."""
        return self.rng.integers(0, stop, count, dtype=np.int32)

    def rope(self, spec: GqaSpec | MlaSpec, max_positions: int) -> F32:
        """The rotation table of an attention."""
        key = (spec.rope, max_positions)
        if key not in self._ropes:
            self._ropes[key] = rope_table(spec.rope, max_positions)
        return self._ropes[key]

    # -- weights --------------------------------------------------------------------------------

    def weights(self, *parts: WeightPart) -> list[tuple[PackedWeight, ...]]:
        """Copies of the weights `parts`, together `footprint` bytes or a little more."""
        if parts != self._parts:
            self._parts = ()
            packed = [self.ops.pack(self.values(*part.shape), dtype=part.dtype) for part in parts]
            self._sets = list(self._copies(packed))
            self._parts = parts
        return self._sets

    def _copies(self, packed: list[PackedWeight]) -> Iterator[tuple[PackedWeight, ...]]:
        size = sum(weight.data.size for weight in packed)
        count = num_copies(self.footprint, size)
        if self._packed.size < count * size:
            self._packed = huge_zeros((count * size,), np.dtype(np.uint8))
        start = 0
        for _ in range(count):
            copy = []
            for weight in packed:
                data = self._packed[start : start + weight.data.size]
                data[:] = weight.data
                copy.append(PackedWeight(weight.layout, weight.dtype, weight.shape, data))
                start += data.size
            yield tuple(copy)

    # -- caches ---------------------------------------------------------------------------------

    def contexts(
        self, spec: GqaSpec | MlaSpec, step: StepShape, kv_dtype: KVDtype = KVDtype.BF16
    ) -> tuple[KVLayer, list[AttentionBatch]]:
        """A cache of `footprint` bytes or a little more; batches that share no block."""
        per_sequence = -(-step.context // BLOCK_SIZE)
        per_batch = step.num_sequences * per_sequence
        count = num_copies(self.footprint, kv_bytes(spec, per_batch * BLOCK_SIZE, kv_dtype))
        num_blocks = count * per_batch
        kv = self._cache(num_blocks, spec, kv_dtype)
        blocks = self.rng.permutation(num_blocks).astype(np.int32)
        tables = blocks.reshape(count, step.num_sequences, per_sequence)
        batches = [_batch(step, table) for table in tables]
        for batch in batches:  # a step makes this view once for all layers
            batch_view(batch, kv.block_size)
        return kv, batches

    def _cache(self, num_blocks: int, spec: GqaSpec | MlaSpec, kv_dtype: KVDtype) -> KVLayer:
        (heads, dim), num_arrays = spec.kv_heads_and_dim, spec.num_kv_arrays
        size = num_blocks * heads * dim * BLOCK_SIZE
        cached = self._bits(num_arrays * size).view(kv_dtype.array_dtype)
        keys, values = cached[:size], cached[size : num_arrays * size]
        if num_arrays == 1:
            return KVLayer(keys.reshape(num_blocks, heads, BLOCK_SIZE, dim), None)
        is_int8 = kv_dtype is KVDtype.INT8
        return KVLayer(
            keys.reshape(num_blocks, heads, dim, BLOCK_SIZE),
            values.reshape(num_blocks, heads, BLOCK_SIZE, dim),
            np.full((num_blocks, heads, 2, BLOCK_SIZE), 0.01, np.float32) if is_int8 else None,
        )

    def _bits(self, count: int) -> Array:
        """At least `count` bfloat16 numbers: twice as many bytes, whose values are as good."""
        if self._cached.size < count:
            self._cached = huge_zeros((count,), np.dtype(np.uint16))
            bits = self.bits(NUM_VALUES)
            for start in range(0, self._cached.size, NUM_VALUES):
                part = self._cached[start : start + NUM_VALUES]
                part[:] = bits[: part.size]
        return self._cached


def expert_choices(gate: GateSpec, tokens: int) -> list[I32]:
    """Choices [T, K] of experts, all equally likely: the same ones every time."""
    scores = np.random.default_rng(0).random((NUM_CHOICES, tokens, gate.num_experts))
    return list(np.argsort(scores, axis=2)[:, :, : gate.top_k].astype(np.int32).copy())


def kv_bytes(spec: GqaSpec | MlaSpec, tokens: int, kv_dtype: KVDtype) -> int:
    """Bytes that a layer's cache holds of `tokens` tokens."""
    heads, dim = spec.kv_heads_and_dim
    scale_bytes = 4 if kv_dtype is KVDtype.INT8 else 0
    row_bytes = dim * kv_dtype.array_dtype.itemsize + scale_bytes
    return spec.num_kv_arrays * heads * row_bytes * tokens


def num_copies(footprint: int, size: int) -> int:
    """How many times `size` bytes make `footprint` bytes."""
    return max(1, -(-footprint // size))


def _batch(step: StepShape, table: I32) -> AttentionBatch:
    """The batch of one step; table [B, blocks of a sequence]."""
    new = np.arange(step.context - step.new_tokens, step.context, dtype=np.int32)
    slots = table[:, new // BLOCK_SIZE] * BLOCK_SIZE + new % BLOCK_SIZE
    starts = np.arange(step.num_sequences + 1, dtype=np.int32) * step.new_tokens
    return AttentionBatch(
        query_start=starts.astype(np.int32),
        seq_lens=np.full(step.num_sequences, step.context, np.int32),
        block_tables=np.ascontiguousarray(table),
        positions=np.tile(new, step.num_sequences),
        slot_mapping=slots.astype(np.int32).ravel(),
    )
