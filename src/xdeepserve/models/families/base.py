"""What all families share: the record of a family and the fields every config.json has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from xdeepserve.models.config_fields import ConfigFields
from xdeepserve.models.rope import MAX_POSITIONS, parse_rope, rope_fields
from xdeepserve.models.spec import (
    MAX_EXPERTS,
    MAX_HEADS,
    MAX_HIDDEN,
    MAX_LAYERS,
    MAX_VOCAB,
    GqaSpec,
    MlaSpec,
    ModelSpec,
    MoeSpec,
)
from xdeepserve.ops import GateSpec


@dataclass(frozen=True, slots=True)
class Family:
    """One family of models.

    Attributes:
        name: what `ModelSpec.family` holds.
        model_types: values of config.json's `model_type` that belong to it.
        parse: config.json -> ModelSpec.
        moe_block: tensor name of the MoE block inside a layer.
        expert_parts: tensor names of an expert's gate, up and down projections.
    """

    name: str
    model_types: tuple[str, ...]
    parse: Callable[[ConfigFields], ModelSpec]
    moe_block: str = "mlp"
    expert_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


def parse_decoder(
    fields: ConfigFields,
    *,
    family: str,
    attention: GqaSpec | MlaSpec,
    moe: MoeSpec | None = None,
    moe_layers: tuple[bool, ...] | None = None,
    intermediate_size: int | None = None,
    has_mtp: bool = False,
) -> ModelSpec:
    """The ModelSpec around a parsed attention and MoE."""
    fields.choice("hidden_act", ("silu",), "silu")
    vocab_size = fields.integer("vocab_size", high=MAX_VOCAB)
    if intermediate_size is None:
        intermediate_size = fields.integer("intermediate_size")
    return ModelSpec(
        family=family,
        vocab_size=vocab_size,
        hidden_size=fields.integer("hidden_size", high=MAX_HIDDEN),
        intermediate_size=intermediate_size,
        attention=attention,
        moe=moe,
        moe_layers=moe_layers or (False,) * num_layers(fields),
        norm_eps=fields.number("rms_norm_eps", high=1.0),
        max_position_embeddings=fields.integer("max_position_embeddings", high=MAX_POSITIONS),
        tie_embeddings=fields.boolean("tie_word_embeddings", False),
        eos_token_ids=fields.integers("eos_token_id", high=vocab_size, scalar=True),
        has_mtp=has_mtp,
    )


def num_layers(fields: ConfigFields) -> int:
    """`num_hidden_layers`, bounded."""
    return fields.integer("num_hidden_layers", high=MAX_LAYERS)


def parse_gqa(
    fields: ConfigFields,
    *,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    qk_norm: bool = False,
    partial_rotary: float = 1.0,
    default_theta: float = 10_000.0,
) -> GqaSpec:
    """The attention of a grouped-query family. `head_dim`: the family's default, if it has one.

    Raises:
        ModelFormatError: heads that do not divide, or a rope that is not supported.
    """
    hidden = fields.integer("hidden_size", high=MAX_HIDDEN)
    heads = fields.integer("num_attention_heads", high=MAX_HEADS)
    kv_heads = fields.integer("num_key_value_heads", heads, high=MAX_HEADS)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"must divide num_attention_heads={heads}")
    if not fields.has("head_dim") and head_dim is None:
        if hidden % heads:
            raise fields.error("num_attention_heads", f"must divide hidden_size={hidden}")
        head_dim = hidden // heads
    head_dim = fields.integer("head_dim", head_dim or 0, high=4096)
    rope = rope_fields(fields, default_theta=default_theta)
    return GqaSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope=parse_rope(rope, head_dim, partial=partial_rotary),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qk_norm=qk_norm,
    )


def parse_sigmoid_moe(fields: ConfigFields, *, groups: int | None = None) -> MoeSpec:
    """DeepSeek-V3's MoE (also GLM-4.5's). `groups`: default of n_group and topk_group, if any."""
    fields.choice("scoring_func", ("sigmoid",), "sigmoid")
    fields.choice("topk_method", ("noaux_tc",), "noaux_tc")
    defaults = {} if groups is None else {"default": groups}
    num_experts = fields.integer("n_routed_experts", high=MAX_EXPERTS)
    num_groups = fields.integer("n_group", high=num_experts, **defaults)
    topk_groups = fields.integer("topk_group", high=num_groups, **defaults)
    if num_experts % num_groups or (num_groups > 1 and num_experts // num_groups < 2):
        raise fields.error(
            "n_group", f"must divide n_routed_experts={num_experts} into groups of 2 or more"
        )
    selectable = num_experts // num_groups * topk_groups
    intermediate = fields.integer("moe_intermediate_size")
    gate = GateSpec(
        num_experts=num_experts,
        top_k=fields.integer("num_experts_per_tok", high=selectable),
        scoring="sigmoid",
        renormalize=fields.boolean("norm_topk_prob", True),
        num_groups=num_groups,
        topk_groups=topk_groups,
        scaling=fields.number("routed_scaling_factor", 1.0, high=1e6),
    )
    num_shared = fields.integer("n_shared_experts", 0, low=0, high=MAX_EXPERTS)
    return MoeSpec(
        gate=gate,
        intermediate_size=intermediate,
        shared_intermediate_size=intermediate * num_shared,
    )


def dense_first(fields: ConfigFields) -> tuple[bool, ...]:
    """Layer kinds of a model whose first `first_k_dense_replace` layers are dense."""
    layers = num_layers(fields)
    dense = fields.integer("first_k_dense_replace", low=0, high=layers)
    fields.integer("moe_layer_freq", 1, low=1, high=1)
    return tuple(idx >= dense for idx in range(layers))


def has_mtp_layer(fields: ConfigFields) -> bool:
    """Whether the checkpoint carries layers for multi-token prediction; the first one is used."""
    return fields.integer("num_nextn_predict_layers", 0, low=0, high=MAX_LAYERS) > 0


def without_absent_mtp(config: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """The config without layers for multi-token prediction that it claims, but `names` lack.

    Checkpoints that `transformers` has written keep the claim and leave the tensors out.
    """
    first = f"model.layers.{config.get('num_hidden_layers')}.eh_proj.weight"
    if first in names:
        return config
    return {name: value for name, value in config.items() if name != "num_nextn_predict_layers"}


def refuse_sliding_window(fields: ConfigFields, *, on_by_default: bool = False) -> None:
    """Raise when some layer would attend to a window shorter than the context.

    Raises:
        ModelFormatError: `layer_types` or `sliding_window` ask for windowed attention.
    """
    layers = num_layers(fields)
    layer_types = fields.strings("layer_types")
    if any(kind != "full_attention" for kind in layer_types):
        raise fields.error("layer_types", "asks for windowed attention, which is not supported")
    if layer_types or not fields.boolean("use_sliding_window", on_by_default):
        return
    if not fields.has("sliding_window"):
        return
    window = fields.integer("sliding_window", high=MAX_POSITIONS)
    first = fields.integer("max_window_layers", 0, low=0, high=MAX_LAYERS)
    if first < layers and window < fields.integer("max_position_embeddings", high=MAX_POSITIONS):
        raise fields.error("sliding_window", "is in use, which is not supported")
