"""Model, and the layer loop as a generator, for steps that are taken apart.

`layer_steps` runs the attention side and yields an `FfnCall` per layer; whoever drives it sends the
FFN output back: local units here (`forward`, the oracle), or a transport elsewhere, with as many
generators in flight as there are microbatches. A step that is not taken apart has no loop here:
`Model.stack` is for `Ops.decoder_layers`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

from xdeepserve.models.batch import ForwardBatch
from xdeepserve.models.kv_cache import KVFormat
from xdeepserve.models.moe import FfnCall
from xdeepserve.models.mtp import MtpUnit
from xdeepserve.models.spec import ModelSpec
from xdeepserve.models.units import AttentionUnit, EmbeddingUnit, ExpertUnit, FfnUnit, HeadUnit
from xdeepserve.ops import (
    F32,
    DecoderLayer,
    DecoderStack,
    KVLayer,
    Mlp,
    Ops,
    WeightDtype,
    composed,
)


@dataclass(frozen=True, slots=True)
class Layer:
    """The units of one layer: `ffn` is its dense MLP or its shared experts."""

    attention: AttentionUnit
    ffn: FfnUnit | None
    experts: ExpertUnit | None

    @property
    def weights(self) -> DecoderLayer:
        """The layer as operators see it."""
        return DecoderLayer(self.attention.layer, _mlp(self.ffn), _mlp(self.experts))


@dataclass(frozen=True, slots=True)
class AttentionSide:
    """What computes a step but for the FFNs; layers are indexed by layer_idx."""

    embedding: EmbeddingUnit
    layers: tuple[AttentionUnit, ...]
    head: HeadUnit


@dataclass(frozen=True, slots=True)
class Model:
    """All units of a model, in one process; `mtp` only drafts, `kv_format` is of its caches."""

    spec: ModelSpec
    dtype: WeightDtype
    ops: Ops
    embedding: EmbeddingUnit
    layers: tuple[Layer, ...]
    head: HeadUnit
    mtp: MtpUnit | None
    kv_format: KVFormat

    @property
    def attention_side(self) -> AttentionSide:
        """Everything but FFNs and experts."""
        layers = tuple(layer.attention for layer in self.layers)
        return AttentionSide(self.embedding, layers, self.head)

    @property
    def stack(self) -> DecoderStack:
        """All layers for `Ops.decoder_layers`; a new one, so keep it."""
        return DecoderStack(tuple(layer.weights for layer in self.layers))

    def with_kv_cache(self, dtype: str) -> Model:
        """The same model with caches of `dtype`: auto, or a KVDtype.

        Raises:
            ConfigError: the model has no such caches.
        """
        return replace(self, kv_format=KVFormat.of(self.spec, self.dtype, dtype))

    def new_kv(self, num_blocks: int, block_size: int) -> list[KVLayer]:
        """Zeroed cache of every layer."""
        return [self.kv_format.new_layer(num_blocks, block_size) for _ in self.layers]


def _mlp(unit: FfnUnit | ExpertUnit | None) -> Mlp | None:
    return None if unit is None else Mlp(unit.gate_up, unit.down)


def layer_steps(
    side: AttentionSide, batch: ForwardBatch, kv_layers: Sequence[KVLayer]
) -> Generator[FfnCall, F32, F32]:
    """Run the attention side of every layer.

    Yields:
        One FfnCall per layer, in order; send back its FFN output [T, H].

    Returns:
        [T, H] hidden states after the last layer, before the final norm.
    """
    residual, ffn_output = side.embedding(batch.token_ids), None
    for layer_idx, attention in enumerate(side.layers):
        out = attention(residual, ffn_output, batch.attention, kv_layers[layer_idx])
        residual = out.residual
        ffn_output = yield FfnCall(layer_idx, out.hidden_states, out.topk_ids, out.topk_weights)
    assert ffn_output is not None, "a model has at least one layer"
    return residual + ffn_output


def local_ffn(model: Model, call: FfnCall) -> F32:
    """[T, H]: the FFN output of `call`, computed by the model's own weights."""
    layer = model.layers[call.layer_idx].weights
    return composed.feed_forward(
        model.ops, layer, call.hidden_states, call.topk_ids, call.topk_weights
    )


def forward(model: Model, batch: ForwardBatch, kv_layers: Sequence[KVLayer]) -> F32:
    """[B', V] logits of `batch.logits_rows`, layer by layer: the oracle of stack and transports."""
    steps = layer_steps(model.attention_side, batch, kv_layers)
    call = next(steps)
    while True:
        try:
            call = steps.send(local_ffn(model, call))
        except StopIteration as finished:
            hidden_states: F32 = finished.value
            return model.head(hidden_states, batch.logits_rows)
