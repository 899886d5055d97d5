"""Drive a Model without an engine: the plainest way to get logits, for tests and experiments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xdeepserve.models.batch import ForwardBatch
from xdeepserve.models.decoder import Model, forward
from xdeepserve.ops import F32, AttentionBatch, KVLayer


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence in one step.

    Attributes:
        token_ids: this step's tokens.
        start: position of the first of them.
        block_table: the sequence's KV blocks, enough for all positions so far.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]


def step_batch(chunks: Sequence[Chunk], block_size: int) -> ForwardBatch:
    """The ForwardBatch of `chunks`, asking for the logits of every token."""
    sizes = [len(chunk.token_ids) for chunk in chunks]
    tables = np.full((len(chunks), max(len(c.block_table) for c in chunks)), -1, np.int32)
    positions, slots = [], []
    for row, chunk in enumerate(chunks):
        tables[row, : len(chunk.block_table)] = chunk.block_table
        at = np.arange(chunk.start, chunk.start + sizes[row], dtype=np.int32)
        positions.append(at)
        slots.append(tables[row, at // block_size] * block_size + at % block_size)
    attention = AttentionBatch(
        query_start=np.cumsum([0, *sizes], dtype=np.int32),
        seq_lens=np.array([c.start + n for c, n in zip(chunks, sizes, strict=True)], np.int32),
        block_tables=tables,
        positions=np.concatenate(positions),
        slot_mapping=np.concatenate(slots),
    )
    token_ids = np.concatenate([np.asarray(c.token_ids, np.int32) for c in chunks])
    return ForwardBatch(token_ids, attention, np.arange(len(token_ids), dtype=np.int32))


class SoloRunner:
    """One sequence, alone in the cache, computed step by step."""

    def __init__(self, model: Model, *, max_tokens: int = 512, block_size: int = 16) -> None:
        self._model = model
        self._block_size = block_size
        num_blocks = -(-max_tokens // block_size)
        self._kv: list[KVLayer] = model.new_kv(num_blocks, block_size)
        self._blocks = range(num_blocks)
        self._num_computed = 0

    def append(self, token_ids: Sequence[int]) -> F32:
        """[len(token_ids), V] logits after each of the next tokens."""
        chunk = Chunk(token_ids, self._num_computed, self._blocks)
        logits = forward(self._model, step_batch([chunk], self._block_size), self._kv)
        self._num_computed += len(token_ids)
        return logits

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """The `num_tokens` most likely tokens after `prompt`, one by one; EOS does not stop."""
        output = [int(self.append(prompt)[-1].argmax())]
        while len(output) < num_tokens:
            output.append(int(self.append(output[-1:])[-1].argmax()))
        return output
