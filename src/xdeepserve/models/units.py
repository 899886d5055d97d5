"""The units a model is taken apart into; each needs only operators and arrays.

    tokens -> Embedding -> [Attention -> {Ffn, Expert}] per layer -> Head -> logits

A unit holds its own packed weights and nothing else, so each can live in another process.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdeepserve.ops import (
    F32,
    I32,
    Array,
    AttentionBatch,
    AttentionLayer,
    AttentionOutput,
    KVLayer,
    Ops,
    PackedWeight,
    composed,
)


@dataclass(frozen=True, slots=True)
class EmbeddingUnit:
    """Token ids -> hidden states. `table` [V, H] float32 or bfloat16 bits."""

    ops: Ops
    table: Array

    def __call__(self, token_ids: I32) -> F32:
        """[T, H] of `token_ids` [T]."""
        return self.ops.embed(self.table, token_ids)


@dataclass(frozen=True, slots=True)
class AttentionUnit:
    """Everything of a layer up to its FFN: norms, attention, residual adds, router."""

    ops: Ops
    layer: AttentionLayer

    def __call__(
        self, residual: F32, ffn_output: F32 | None, batch: AttentionBatch, kv: KVLayer
    ) -> AttentionOutput:
        """Run the layer's attention; see `Ops.gqa_layer`."""
        return composed.attention_layer(self.ops, self.layer, residual, ffn_output, batch, kv)


@dataclass(frozen=True, slots=True)
class FfnUnit:
    """A layer's dense MLP, or all its shared experts as one MLP."""

    ops: Ops
    gate_up: PackedWeight
    down: PackedWeight

    def __call__(self, hidden_states: F32, out: F32 | None = None) -> F32:
        """[T, H] -> [T, H], written to `out` if it is given."""
        return self.ops.swiglu_mlp(hidden_states, self.gate_up, self.down, out)


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

    def __call__(self, rows: F32, num_tokens_per_expert: I32, out: F32 | None = None) -> F32:
        """[R, H] from rows [R, H] sorted by expert, written to `out` if it is given.

        num_tokens_per_expert [E] sums to R.
        """
        return self.ops.expert_mlp(rows, num_tokens_per_expert, self.gate_up, self.down, out)

    def routed(self, x: F32, topk_ids: I32, topk_weights: F32) -> F32:
        """[T, H]: the experts of the tokens x [T, H], added up; ids count from expert 0 of here."""
        return self.ops.routed_experts(x, topk_ids, topk_weights, self.gate_up, self.down)

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
        return self.ops.linear(self._normed(hidden_states[logits_rows]), self.lm_head)

    def choose(self, hidden_states: F32, num_greedy: int) -> tuple[I32, F32]:
        """See `Ops.lm_head`; hidden_states [B', H] are the rows that sample."""
        return self.ops.lm_head(self._normed(hidden_states), self.lm_head, num_greedy)

    def _normed(self, rows: F32) -> F32:
        return self.ops.rms_norm(rows, self.norm, self.norm_eps)
