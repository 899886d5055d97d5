"""Multi-token prediction: one more layer that guesses the id after the next one.

    h(i)    final-normed hidden state of position i --> norm --+
                                                               +--> projection --> layer --> head
    t(i+1)  the id sampled or read behind it --> embedding --> norm

Row i of the layer, at position i, predicts t(i+2); fed with its own output and its own guess it
goes on one id further. Embedding and LM head are the main model's.
Source: DeepSeek-V3 (arXiv:2412.19437), section 2.2, with the layout of its published checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xdeepserve.models.batch import ForwardBatch
from xdeepserve.models.units import EmbeddingUnit, HeadUnit
from xdeepserve.ops import F32, DecoderStack, KVLayer, Ops, PackedWeight


@dataclass(frozen=True, slots=True)
class MtpUnit:
    """The MTP layer of a model, FFN and experts included: drafts need no other process.

    Attributes:
        main_norm: the main model's final norm.
        projection: [H, 2H]; its first H columns are for the embedding.
        stack: one layer.
        head: its own norm before the main model's LM head.
    """

    ops: Ops
    norm_eps: float
    embedding: EmbeddingUnit
    embedding_norm: F32
    main_norm: F32
    hidden_norm: F32
    projection: PackedWeight
    stack: DecoderStack
    head: HeadUnit

    def main_states(self, hidden_states: F32) -> F32:
        """[T, H] for `__call__`, from the main model's hidden states after its last layer."""
        return self.ops.rms_norm(hidden_states, self.main_norm, self.norm_eps)

    def __call__(self, states: F32, batch: ForwardBatch, kv: KVLayer) -> F32:
        """[T, H] states after the layer: for `head`, or for the next id's row.

        Args:
            states: [T, H] what is known of each row's position.
            batch: positions as in the main model; `token_ids` are the ids behind them.
            kv: this layer's cache, written at the batch's slots.
        """
        ops = self.ops
        known = ops.rms_norm(states, self.hidden_norm, self.norm_eps)
        embedded = self.embedding(batch.token_ids)
        embedded = ops.rms_norm(embedded, self.embedding_norm, self.norm_eps)
        joined = np.concatenate([embedded, known], axis=1)
        projected = ops.linear(joined, self.projection)
        return ops.decoder_layers(self.stack, projected, batch.attention, [kv])
