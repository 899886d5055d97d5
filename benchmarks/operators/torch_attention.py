"""torch's side of attention: `scaled_dot_product_attention` over contiguous keys and values.

A paged cache is what torch lacks, so its keys lie as it likes them: a tensor per batch. The query
heads that share a key head may be handed over as such, or as rows of one head; the faster counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.operators.operands import StepShape
from benchmarks.operators.torch_operands import Tensor, TorchOperands

from xdeepserve.models.spec import GqaSpec, MlaSpec

Ways = dict[str, list[Callable[[], object]]]


def grouped_query(spec: GqaSpec, step: StepShape, operands: TorchOperands) -> Ways:
    """Decode and prefill; the rows of a prefill see what is before them."""
    batch, new, heads = step.num_sequences, step.new_tokens, spec.num_heads
    shape = (batch, spec.num_kv_heads, step.context, spec.head_dim)
    pairs = operands.values(2, *shape).bfloat16()
    q = operands.values(batch, heads, new, spec.head_dim).bfloat16()
    sets = [tuple(pair) for pair in operands.copies(pairs)]
    attend = partial(operands.torch.nn.functional.scaled_dot_product_attention, scale=spec.scale)
    attend = partial(attend, **_mask(step, operands))
    ways: Ways = {"sdpa": [partial(attend, q, k, v, enable_gqa=True) for k, v in sets]}
    if new == 1:
        rows = q.view(batch, spec.num_kv_heads, heads // spec.num_kv_heads, spec.head_dim)
        ways["sdpa, heads as rows"] = [partial(attend, rows, k, v) for k, v in sets]
    return ways


def _mask(step: StepShape, operands: TorchOperands) -> dict[str, Tensor]:
    if step.new_tokens == 1:
        return {}
    if step.new_tokens == step.context:
        return {"is_causal": True}
    ones = operands.torch.ones(step.new_tokens, step.context, dtype=operands.torch.bool)
    return {"attn_mask": ones.tril(step.context - step.new_tokens)}


def latent(spec: MlaSpec, step: StepShape, operands: TorchOperands) -> Ways:
    """MLA in absorbed form: one key head, whose first entries are the value."""
    batch, new, heads = step.num_sequences, step.new_tokens, spec.num_heads
    width = spec.kv_lora_rank + spec.qk_rope_head_dim
    caches = operands.copies(operands.values(batch, 1, step.context, width).bfloat16())
    attend = partial(operands.torch.nn.functional.scaled_dot_product_attention, scale=spec.scale)
    attend = partial(attend, **_mask(step, operands))
    if new == 1:
        q = operands.values(batch, 1, heads, width).bfloat16()
    else:
        q = operands.values(batch, heads, new, width).bfloat16()
        caches = [cache.expand(batch, heads, step.context, width) for cache in caches]
    return {"sdpa": [partial(attend, q, k, k[..., : spec.kv_lora_rank]) for k in caches]}


def rope(spec: MlaSpec, step: StepShape, operands: TorchOperands) -> Ways:
    """Rotation in halves."""
    torch = operands.torch
    width = spec.qk_rope_head_dim
    x = operands.values(step.num_tokens, spec.num_heads, width)
    cos, sin = operands.values(2, step.num_tokens, 1, width // 2)

    def call() -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

    return {"multiply, cat": [call]}
