"""ModelSpec: the architecture of one model, validated, independent of file formats.

Built by `families.parse_spec` from an untrusted config.json; everything behind it may trust it.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdeepserve.models.rope import RopeSpec
from xdeepserve.ops import GateSpec

MAX_HIDDEN = 1 << 17
MAX_LAYERS = 1 << 10
MAX_HEADS = 1 << 11
MAX_EXPERTS = 1 << 12
MAX_VOCAB = 1 << 21


@dataclass(frozen=True, slots=True, kw_only=True)
class GqaSpec:
    """Grouped-query attention. `qk_norm`: RMS norm over each head of q and k before rotation."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False

    @property
    def scale(self) -> float:
        """Factor on q.k before the softmax."""
        return float(self.head_dim**-0.5)

    @property
    def kv_heads_and_dim(self) -> tuple[int, int]:
        """Heads and row length of one cache array."""
        return self.num_kv_heads, self.head_dim

    @property
    def num_kv_arrays(self) -> int:
        """Arrays per layer: keys and values."""
        return 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Attributes:
        q_lora_rank: rank of the compressed query; None = the query is projected directly.
        rope_interleaved: the checkpoint stores rotary rows as (even, odd) pairs; they are permuted
            at load so that operators only know rotation in halves.
        scale: factor on scores before the softmax, including YaRN's mscale.
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: RopeSpec
    rope_interleaved: bool
    bias: bool
    scale: float

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def kv_heads_and_dim(self) -> tuple[int, int]:
        """One cached row per token: the latent, then the rotated key."""
        return 1, self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def num_kv_arrays(self) -> int:
        """Arrays per layer: values are read from the latent."""
        return 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """The experts of one MoE layer.

    Attributes:
        gate: how the router chooses.
        intermediate_size: neurons of one routed expert.
        shared_intermediate_size: neurons of all shared experts together; 0 = none.
    """

    gate: GateSpec
    intermediate_size: int
    shared_intermediate_size: int = 0

    @property
    def has_correction_bias(self) -> bool:
        """Whether the router adds a learned bias when choosing (`noaux_tc`)."""
        return self.gate.scoring == "sigmoid"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One decoder-only model.

    Attributes:
        family: name of the family module, for example "qwen3_moe".
        intermediate_size: FFN neurons of a dense layer.
        moe: None for a dense model.
        moe_layers: [num_layers]; whether a layer routes to experts.
        eos_token_ids: ids that end a sequence; may be empty.
        has_mtp: whether a layer for multi-token prediction follows the last one (`models/mtp.py`).
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    attention: GqaSpec | MlaSpec
    moe: MoeSpec | None
    moe_layers: tuple[bool, ...]
    norm_eps: float
    max_position_embeddings: int
    tie_embeddings: bool
    eos_token_ids: tuple[int, ...]
    has_mtp: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.moe_layers)

    def moe_of(self, layer_idx: int) -> MoeSpec | None:
        """The MoE of a layer, None where the layer is dense. The MTP layer is like the last one."""
        idx = min(layer_idx, self.num_layers - 1)
        return self.moe if self.moe_layers[idx] else None

    def kv_values_per_token(self) -> int:
        """Cached numbers per token over all layers."""
        heads, dim = self.attention.kv_heads_and_dim
        return self.num_layers * self.attention.num_kv_arrays * heads * dim

    def num_parameters(self) -> int:
        """Weights of the model as served, without biases and norms (under 0.1 percent)."""
        dense, routed, shared = self._ffn_parameters()
        tables = (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size
        return tables + self.num_layers * self._attention_parameters() + dense + routed + shared

    def num_active_parameters(self) -> int:
        """Weights one token passes through; without the embedding table, with the LM head."""
        dense, routed, shared = self._ffn_parameters()
        if self.moe is not None:
            routed = routed * self.moe.gate.top_k // self.moe.gate.num_experts
        head = self.vocab_size * self.hidden_size
        return head + self.num_layers * self._attention_parameters() + dense + routed + shared

    def _ffn_parameters(self) -> tuple[int, int, int]:
        per_neuron = 3 * self.hidden_size
        num_moe = sum(self.moe_layers)
        dense = (self.num_layers - num_moe) * per_neuron * self.intermediate_size
        if self.moe is None:
            return dense, 0, 0
        routed = num_moe * per_neuron * self.moe.intermediate_size * self.moe.gate.num_experts
        return dense, routed, num_moe * per_neuron * self.moe.shared_intermediate_size

    def _attention_parameters(self) -> int:
        spec, hidden = self.attention, self.hidden_size
        if isinstance(spec, GqaSpec):
            return 2 * hidden * spec.head_dim * (spec.num_heads + spec.num_kv_heads)
        q_rank = spec.q_lora_rank
        q_out = spec.num_heads * spec.qk_head_dim
        query = hidden * q_out if q_rank is None else q_rank * (hidden + q_out)
        latent = hidden * (spec.kv_lora_rank + spec.qk_rope_head_dim)
        expand = spec.num_heads * spec.kv_lora_rank * (spec.qk_nope_head_dim + spec.v_head_dim)
        return query + latent + expand + spec.num_heads * spec.v_head_dim * hidden
