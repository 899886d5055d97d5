"""build_model: ask a WeightProvider for every weight of a ModelSpec and assemble the units.

The order and the names of the requests are fixed by the spec alone, so the same code packs a
checkpoint into a cache file and maps that file back. A process that runs only some units asks the
builder for those.
"""

from __future__ import annotations

from xdeepserve.models.build_attention import AttentionBuilder
from xdeepserve.models.checkpoint_api import Checkpoint, WeightProvider
from xdeepserve.models.decoder import Layer, Model
from xdeepserve.models.families import family_of
from xdeepserve.models.kv_cache import KVFormat
from xdeepserve.models.mtp import MtpUnit
from xdeepserve.models.quantize import DtypePolicy
from xdeepserve.models.rope import rope_table
from xdeepserve.models.spec import ModelSpec
from xdeepserve.models.units import AttentionUnit, EmbeddingUnit, ExpertUnit, FfnUnit, HeadUnit
from xdeepserve.models.weights import Weights
from xdeepserve.ops import F32, Array, DecoderStack, LayerFrame, Ops, Router, WeightDtype
from xdeepserve.ops.quant import to_bf16


def build_model(
    spec: ModelSpec,
    provider: WeightProvider,
    ops: Ops,
    checkpoint: Checkpoint | None = None,
    *,
    dtype: WeightDtype,
    max_positions: int = 0,
) -> Model:
    """Assemble all units of a model.

    Args:
        provider: packs or maps the weights.
        checkpoint: where weights that must be packed now are read; None = all are packed already.
        dtype: precision; `quantize.DtypePolicy` says what it means for each weight.
        max_positions: longest context to be served (size of the rope table); 0 = what the model
            supports.

    Raises:
        ModelFormatError: a tensor is missing or of the wrong shape.
    """
    weights = Weights(provider, checkpoint, DtypePolicy(dtype, spec.num_layers, ops.outlier_dtype))
    builder = ModelBuilder(spec, weights, ops, max_positions=max_positions)
    layers = tuple(builder.layer(idx) for idx in range(spec.num_layers))
    embedding, head = builder.embedding(), builder.head()
    mtp, kv_format = builder.mtp(embedding, head), KVFormat.of(spec, dtype)
    return Model(spec, dtype, ops, embedding, layers, head, mtp, kv_format)


class ModelBuilder:
    """Builds single units of a model."""

    def __init__(
        self, spec: ModelSpec, weights: Weights, ops: Ops, *, max_positions: int = 0
    ) -> None:
        self._spec = spec
        self._weights = weights
        self._ops = ops
        self._family = family_of(spec)
        limit = spec.max_position_embeddings
        self._rope = rope_table(spec.attention.rope, min(max_positions or limit, limit))

    def embedding(self) -> EmbeddingUnit:
        """The input embedding, float32 or bfloat16 bits."""

        def load() -> Array:
            exact = self._weights.policy.embedding is WeightDtype.FLOAT32
            return self._embedding_table() if exact else to_bf16(self._embedding_table())

        return EmbeddingUnit(self._ops, self._weights.provider.array("embedding", load))

    def head(self) -> HeadUnit:
        """The final norm and the LM head (the embedding table again where they are tied)."""
        spec, weights = self._spec, self._weights

        def load() -> F32:
            if spec.tie_embeddings:
                return self._embedding_table()
            return weights.read("lm_head.weight", spec.vocab_size, spec.hidden_size)

        norm = weights.vector("head.norm", "model.norm.weight", spec.hidden_size)
        lm_head = weights.packed("head.lm_head", load)
        return HeadUnit(self._ops, norm, spec.norm_eps, lm_head)

    def mtp(self, embedding: EmbeddingUnit, head: HeadUnit) -> MtpUnit | None:
        """The layer behind the last one, around the main model's embedding and LM head.

        Its own copies of the two are not read: the published checkpoints share them.
        """
        spec, weights = self._spec, self._weights
        if not spec.has_mtp:
            return None
        idx, hidden = spec.num_layers, spec.hidden_size
        theirs = f"model.layers.{idx}"
        norm = weights.vector("mtp.head_norm", f"{theirs}.shared_head.norm.weight", hidden)
        return MtpUnit(
            ops=self._ops,
            norm_eps=spec.norm_eps,
            embedding=embedding,
            embedding_norm=weights.vector("mtp.embedding_norm", f"{theirs}.enorm.weight", hidden),
            main_norm=head.norm,
            hidden_norm=weights.vector("mtp.hidden_norm", f"{theirs}.hnorm.weight", hidden),
            projection=weights.linear(
                "mtp.projection", [(f"{theirs}.eh_proj", hidden)], 2 * hidden
            ),
            stack=DecoderStack((self.layer(idx).weights,)),
            head=HeadUnit(self._ops, norm, spec.norm_eps, head.lm_head),
        )

    def layer(self, idx: int) -> Layer:
        """All units of layer `idx`."""
        return Layer(self.attention(idx), self.ffn(idx), self.experts(idx))

    def attention(self, idx: int) -> AttentionUnit:
        """The attention side of layer `idx`, router included."""
        spec, ours, theirs = self._spec, f"layers.{idx}", f"model.layers.{idx}"
        hidden, vector = spec.hidden_size, self._weights.vector
        builder = AttentionBuilder(
            self._weights,
            hidden_size=hidden,
            norm_eps=spec.norm_eps,
            rope=self._rope,
            layer_idx=idx,
        )
        frame = LayerFrame(
            input_norm=vector(f"{ours}.input_norm", f"{theirs}.input_layernorm.weight", hidden),
            ffn_norm=vector(
                f"{ours}.ffn_norm", f"{theirs}.post_attention_layernorm.weight", hidden
            ),
            norm_eps=spec.norm_eps,
            router=self._router(idx),
        )
        return AttentionUnit(self._ops, builder.layer(spec.attention, frame))

    def ffn(self, idx: int) -> FfnUnit | None:
        """The dense MLP or the shared experts of layer `idx`; None where there is neither."""
        moe, hidden = self._spec.moe_of(idx), self._spec.hidden_size
        size = self._spec.intermediate_size if moe is None else moe.shared_intermediate_size
        if size == 0:
            return None
        theirs = f"model.layers.{idx}.mlp" if moe is None else f"{self._moe(idx)}.shared_experts"
        gate_up_rows = [(f"{theirs}.gate_proj", size), (f"{theirs}.up_proj", size)]
        gate_up = self._weights.linear(f"layers.{idx}.ffn.gate_up", gate_up_rows, hidden)
        down_rows = [(f"{theirs}.down_proj", hidden)]
        down = self._weights.linear(f"layers.{idx}.ffn.down", down_rows, size)
        return FfnUnit(self._ops, gate_up, down)

    def experts(self, idx: int) -> ExpertUnit | None:
        """All routed experts of layer `idx`; None on a dense layer."""
        moe, hidden = self._spec.moe_of(idx), self._spec.hidden_size
        if moe is None:
            return None
        ours, theirs = f"layers.{idx}.experts", f"{self._moe(idx)}.experts"
        gate, up, down = self._family.expert_parts
        size, ids = moe.intermediate_size, range(moe.gate.num_experts)
        packed_gate_up = self._weights.experts(
            f"{ours}.gate_up",
            f"{theirs}.gate_up_proj",
            [[(f"{theirs}.{e}.{gate}", size), (f"{theirs}.{e}.{up}", size)] for e in ids],
            hidden,
        )
        packed_down = self._weights.experts(
            f"{ours}.down",
            f"{theirs}.down_proj",
            [[(f"{theirs}.{e}.{down}", hidden)] for e in ids],
            size,
        )
        return ExpertUnit(self._ops, packed_gate_up, packed_down)

    def _router(self, idx: int) -> Router | None:
        moe, weights = self._spec.moe_of(idx), self._weights
        if moe is None:
            return None
        ours, theirs = f"layers.{idx}.router", f"{self._moe(idx)}.gate"
        experts, hidden = moe.gate.num_experts, self._spec.hidden_size
        weight = weights.packed(
            f"{ours}.weight", lambda: weights.read(f"{theirs}.weight", experts, hidden)
        )
        bias = None
        if moe.has_correction_bias:
            bias = weights.vector(f"{ours}.bias", f"{theirs}.e_score_correction_bias", experts)
        return Router(weight, bias, moe.gate)

    def _embedding_table(self) -> F32:
        shape = (self._spec.vocab_size, self._spec.hidden_size)
        return self._weights.read("model.embed_tokens.weight", *shape)

    def _moe(self, idx: int) -> str:
        return f"model.layers.{idx}.{self._family.moe_block}"
