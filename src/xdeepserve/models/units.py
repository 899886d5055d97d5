"""The units a model is taken apart into; each needs only operators and arrays.

    tokens -> Embedding -> [Attention -> {Ffn, Expert}] per layer -> Head -> logits

A unit holds its own packed weights and nothing else, so each can live in another process.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xdeepserve.models.attention import Attention
from xdeepserve.ops import F32, I32, Array, AttentionBatch, GateSpec, KVLayer, Ops, PackedWeight


@dataclass(frozen=True, slots=True)
class EmbeddingUnit:
    """Token ids -> hidden states. `table` [V, H] float32 or bfloat16 bits."""

    ops: Ops
    table: Array

    def __call__(self, token_ids: I32) -> F32:
        """[T, H] of `token_ids` [T]."""
        return self.ops.embed(self.table, token_ids)


@dataclass(frozen=True, slots=True)
class Router:
    """Chooses experts. Its weight is float32 in every precision: a flipped choice is not noise."""

    weight: PackedWeight
    correction_bias: F32 | None
    spec: GateSpec

    def __call__(self, ops: Ops, hidden_states: F32) -> tuple[I32, F32]:
        """(topk_ids [T, K], topk_weights [T, K])."""
        logits = ops.linear(hidden_states, self.weight)
        return ops.gate_topk(logits, self.spec, self.correction_bias)


@dataclass(frozen=True, slots=True)
class AttentionOutput:
    """What a layer's attention hands on.

    Attributes:
        residual: [T, H]; stays with the attention side.
        hidden_states: [T, H], normed; goes to FFN and experts.
        topk_ids: [T, K] logical expert ids; None on a dense layer.
        topk_weights: [T, K]; None on a dense layer.
    """

    residual: F32
    hidden_states: F32
    topk_ids: I32 | None
    topk_weights: F32 | None


@dataclass(frozen=True, slots=True)
class AttentionUnit:
    """Everything of a layer up to its FFN: norms, attention, residual adds, router."""

    ops: Ops
    attention: Attention
    input_norm: F32
    ffn_norm: F32
    norm_eps: float
    router: Router | None

    def __call__(
        self, residual: F32, ffn_output: F32 | None, batch: AttentionBatch, kv: KVLayer
    ) -> AttentionOutput:
        """Run the layer's attention.

        Args:
            residual: [T, H] residual stream before the previous layer's FFN output was added.
            ffn_output: [T, H] of the previous layer; None for the first layer.
            batch: which tokens these are and where their KV lives.
            kv: this layer's cache; this step's tokens are written.
        """
        ops = self.ops
        if ffn_output is None:
            normed = ops.rms_norm(residual, self.input_norm, self.norm_eps)
        else:
            residual, normed = ops.add_rms_norm(
                residual, ffn_output, self.input_norm, self.norm_eps
            )
        attended = self.attention(ops, normed, batch, kv)
        residual, hidden = ops.add_rms_norm(residual, attended, self.ffn_norm, self.norm_eps)
        if self.router is None:
            return AttentionOutput(residual, hidden, None, None)
        topk_ids, topk_weights = self.router(ops, hidden)
        return AttentionOutput(residual, hidden, topk_ids, topk_weights)


@dataclass(frozen=True, slots=True)
class FfnUnit:
    """A layer's dense MLP, or all its shared experts as one MLP."""

    ops: Ops
    gate_up: PackedWeight
    down: PackedWeight

    def __call__(self, hidden_states: F32) -> F32:
        """[T, H] -> [T, H]."""
        return self.ops.swiglu_mlp(hidden_states, self.gate_up, self.down)


@dataclass(frozen=True, slots=True)
class ExpertUnit:
    """The routed experts [first, first + E) of one layer.

    Attributes:
        gate_up: [E, 2I, H].
        down: [E, H, I].
        first: logical id of expert 0 of this unit.
    """

    ops: Ops
    gate_up: PackedWeight
    down: PackedWeight
    first: int = 0

    @property
    def num_experts(self) -> int:
        """E, the experts held here."""
        return self.gate_up.shape[0]

    def __call__(self, rows: F32, num_tokens_per_expert: I32) -> F32:
        """[R, H] from rows [R, H] sorted by expert; num_tokens_per_expert [E] sums to R."""
        return self.ops.expert_mlp(rows, num_tokens_per_expert, self.gate_up, self.down)

    def experts(self, start: int, stop: int) -> ExpertUnit:
        """The unit of logical experts [start, stop), sharing memory."""
        low, high = start - self.first, stop - self.first
        return ExpertUnit(
            self.ops, self.gate_up.groups(low, high), self.down.groups(low, high), start
        )


@dataclass(frozen=True, slots=True)
class HeadUnit:
    """Final norm and LM head, on the rows that sample."""

    ops: Ops
    norm: F32
    norm_eps: float
    lm_head: PackedWeight

    def __call__(self, hidden_states: F32, logits_rows: I32) -> F32:
        """[B', V] logits of rows `logits_rows` [B'] of hidden_states [T, H]."""
        rows = np.ascontiguousarray(hidden_states[logits_rows])
        return self.ops.linear(self.ops.rms_norm(rows, self.norm, self.norm_eps), self.lm_head)
