"""The cases of attention's operators: a batch of equal sequences over a bfloat16 cache, and over an
int8 one where the model has such caches. The case's dtype is the cache's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

import numpy as np
from benchmarks.operators import torch_attention
from benchmarks.operators.case import Calls, Case, Prepared, Sizes
from benchmarks.operators.operands import Operands, StepShape, kv_bytes
from benchmarks.operators.roofline import Work
from benchmarks.operators.weights import first_linear

from xdeepserve.models.kv_cache import KVDtype
from xdeepserve.models.spec import GqaSpec, MlaSpec, ModelSpec
from xdeepserve.ops import QKNorm, WeightDtype

KV_DTYPES: Final = (KVDtype.BF16, KVDtype.INT8)


def is_prefill(step: StepShape) -> str:
    """Which of two kinds of step this is."""
    return "prefill" if step.new_tokens > 1 else "decode"


def attention_work(
    spec: GqaSpec | MlaSpec, step: StepShape, kv_dtype: KVDtype = KVDtype.BF16
) -> Work:
    """Scores and weighted values over the cached contexts."""
    if isinstance(spec, GqaSpec):
        per_position = 4 * spec.num_heads * spec.head_dim
        cache_bytes = 8 * step.num_tokens * spec.num_heads * spec.head_dim
    else:
        sums = 2 * spec.kv_lora_rank + spec.qk_rope_head_dim
        per_position = 2 * spec.num_heads * sums
        cache_bytes = 4 * step.num_tokens * spec.num_heads * sums
    return Work(
        memory_bytes=kv_bytes(spec, step.cached_tokens, kv_dtype),
        cache_bytes=cache_bytes,
        operations=per_position * step.visible_positions,
        dtype=WeightDtype.BF16,
    )


def _short_steps(sizes: Sizes) -> list[StepShape]:
    """Operators that only write look at no context: the shortest of each batch."""
    shortest: dict[int, StepShape] = {}
    for step in sizes.steps():
        shortest.setdefault(step.num_tokens, step)
    return list(shortest.values())


# -- grouped-query attention --------------------------------------------------------------------


def rope_kv_write(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """A step's keys and values, to blocks that no cache holds."""
    spec = model.attention
    if not isinstance(spec, GqaSpec):
        return

    def prepare(spec: GqaSpec, step: StepShape, kv_dtype: KVDtype, operands: Operands) -> Prepared:
        kv, batches = operands.contexts(spec, step, kv_dtype)
        qkv = operands.values(step.num_tokens, first_linear(model)[1][1])
        rope, norm = operands.rope(spec, step.context), head_norm(spec, operands)
        calls: Calls = [
            partial(
                operands.ops.rope_kv_write,
                qkv, rope, batch, kv, num_heads=spec.num_heads, norm=norm,
            )
            for batch in batches
        ]  # fmt: skip
        written = kv_bytes(spec, step.num_tokens, kv_dtype)
        return Prepared(calls, Work(memory_bytes=written, cache_bytes=2 * qkv.nbytes))

    for kv_dtype in KV_DTYPES:
        for step in _short_steps(sizes):
            yield Case(
                "rope_kv_write", is_prefill(step), step.num_tokens, step.context, str(kv_dtype),
                partial(prepare, spec, step, kv_dtype),
            )  # fmt: skip


def head_norm(spec: GqaSpec, operands: Operands) -> QKNorm | None:
    """Of queries and keys, where the model has it."""
    if not spec.qk_norm:
        return None
    return QKNorm(operands.values(spec.head_dim), operands.values(spec.head_dim), 1e-6)


def paged_attention(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """Queries over whole contexts."""
    spec = model.attention
    if not isinstance(spec, GqaSpec):
        return

    def prepare(spec: GqaSpec, step: StepShape, kv_dtype: KVDtype, operands: Operands) -> Prepared:
        kv, batches = operands.contexts(spec, step, kv_dtype)
        q = operands.values(step.num_tokens, spec.num_heads, spec.head_dim)
        attend = partial(operands.ops.paged_attention, kv=kv, scale=spec.scale)
        calls: Calls = [partial(attend, q, batch) for batch in batches]
        return Prepared(calls, attention_work(spec, step, kv_dtype))

    for kv_dtype in KV_DTYPES:
        for step in sizes.steps():
            peer = partial(torch_attention.grouped_query, spec, step)
            yield Case(
                "paged_attention", is_prefill(step), step.num_tokens, step.context, str(kv_dtype),
                partial(prepare, spec, step, kv_dtype),
                peer if kv_dtype is KVDtype.BF16 else None,
            )  # fmt: skip


# -- latent attention ---------------------------------------------------------------------------


def rope(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """The rotary part of MLA's queries; where heads are whole, `rope_kv_write` rotates."""
    spec = model.attention
    if not isinstance(spec, MlaSpec):
        return

    def prepare(spec: MlaSpec, step: StepShape, operands: Operands) -> Prepared:
        x = operands.values(step.num_tokens, spec.num_heads, spec.qk_rope_head_dim)
        positions = np.arange(step.num_tokens, dtype=np.int32) % step.context
        call = partial(operands.ops.rope, x, operands.rope(spec, step.context), positions)
        return Prepared([call], Work(cache_bytes=2 * x.nbytes))

    for step in _short_steps(sizes):
        yield Case(
            "rope", is_prefill(step), step.num_tokens, None, "",
            partial(prepare, spec, step),
            partial(torch_attention.rope, spec, step),
        )  # fmt: skip


def mla_kv_write(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """A step's latents, to blocks that no cache holds."""
    spec = model.attention
    if not isinstance(spec, MlaSpec):
        return

    def prepare(spec: MlaSpec, step: StepShape, operands: Operands) -> Prepared:
        kv, batches = operands.contexts(spec, step)
        latent = operands.values(step.num_tokens, spec.kv_lora_rank)
        k_rope = operands.values(step.num_tokens, spec.qk_rope_head_dim)
        write = partial(operands.ops.mla_kv_write, latent, k_rope)
        calls: Calls = [partial(write, batch, kv) for batch in batches]
        written = kv_bytes(spec, step.num_tokens, KVDtype.BF16)
        return Prepared(calls, Work(memory_bytes=written, cache_bytes=2 * written))

    for step in _short_steps(sizes):
        yield Case(
            "mla_kv_write", is_prefill(step), step.num_tokens, step.context, "",
            partial(prepare, spec, step),
        )  # fmt: skip


def mla_attention(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """All heads over one row per position."""
    spec = model.attention
    if not isinstance(spec, MlaSpec):
        return

    def prepare(spec: MlaSpec, step: StepShape, operands: Operands) -> Prepared:
        kv, batches = operands.contexts(spec, step)
        q_latent = operands.values(step.num_tokens, spec.num_heads, spec.kv_lora_rank)
        q_rope = operands.values(step.num_tokens, spec.num_heads, spec.qk_rope_head_dim)
        attend = partial(operands.ops.mla_attention, kv=kv, scale=spec.scale)
        calls: Calls = [partial(attend, q_latent, q_rope, batch) for batch in batches]
        return Prepared(calls, attention_work(spec, step))

    for step in sizes.steps():
        yield Case(
            "mla_attention", is_prefill(step), step.num_tokens, step.context, "bf16",
            partial(prepare, spec, step),
            partial(torch_attention.latent, spec, step),
        )  # fmt: skip
