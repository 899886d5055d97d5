"""Which weights a layer of a model has: [G, N, K] by the name of the place."""

from __future__ import annotations

from collections.abc import Iterator

from xdeepserve.models.spec import GqaSpec, ModelSpec

Shape = tuple[int, int, int]


def linear_weights(model: ModelSpec) -> Iterator[tuple[str, Shape]]:
    """Plain projections of a layer, stacked as they are served."""
    spec, width = model.attention, model.hidden_size
    if isinstance(spec, GqaSpec):
        yield "qkv", (1, (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim, width)
        yield "output", (1, width, spec.num_heads * spec.head_dim)
    else:
        query = spec.num_heads * spec.qk_head_dim
        latent = spec.kv_lora_rank + spec.qk_rope_head_dim
        yield "latents", (1, (spec.q_lora_rank or query) + latent, width)
        if spec.q_lora_rank is not None:
            yield "query", (1, query, spec.q_lora_rank)
        yield "output", (1, width, spec.num_heads * spec.v_head_dim)
    if model.moe is not None:
        yield "router", (1, model.moe.gate.num_experts, width)


def first_linear(model: ModelSpec) -> tuple[str, Shape]:
    """The projection that a layer begins with."""
    return next(linear_weights(model))


def grouped_weights(model: ModelSpec) -> Iterator[tuple[str, Shape]]:
    """MLA's matrices of each head; see `MlaLayer`."""
    spec = model.attention
    if isinstance(spec, GqaSpec):
        return
    yield "key_absorb", (spec.num_heads, spec.kv_lora_rank, spec.qk_nope_head_dim)
    yield "value_absorb", (spec.num_heads, spec.v_head_dim, spec.kv_lora_rank)


def mlp_sites(model: ModelSpec) -> Iterator[tuple[str, list[Shape]]]:
    """(gate and up, down) of a dense layer and of the shared experts."""
    if not all(model.moe_layers):
        yield "dense", _mlp(1, model.intermediate_size, model.hidden_size)
    if model.moe is not None and model.moe.shared_intermediate_size:
        yield "shared", _mlp(1, model.moe.shared_intermediate_size, model.hidden_size)


def experts_of(model: ModelSpec) -> list[Shape]:
    """(gate and up, down) of all routed experts of a layer."""
    assert model.moe is not None, "a dense model has no experts"
    return _mlp(model.moe.gate.num_experts, model.moe.intermediate_size, model.hidden_size)


def _mlp(groups: int, neurons: int, width: int) -> list[Shape]:
    return [(groups, 2 * neurons, width), (groups, width, neurons)]
