"""The same function under other names of its channels: a model whose weights left their grid.

SmolLM2-135M comes out of a Q4_1 file: each 32 neighbours of its weights hold at most 16 values. A
4-bit format with the same groups finds those again and loses next to nothing, which says nothing
about models that were never quantized. Permuting the hidden channels and the FFN neurons keeps what
the model computes and mixes values of different groups, so that this copy tells what 4 bits cost.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xdeepserve.models.checkpoint_api import Checkpoint
from xdeepserve.ops import F32, I32

_FFN_IN = ("gate_proj.weight", "up_proj.weight")
_FFN_OUT = "down_proj.weight"
_HIDDEN_ROWS = ("norm.weight", "layernorm.weight", "o_proj.weight", _FFN_OUT)


class ShuffledCheckpoint:
    """A checkpoint of the llama kind, dense or with experts, with permuted channels.

    Attention heads and experts stay where they are.
    """

    def __init__(self, source: Checkpoint, seed: int = 0) -> None:
        self._source = source
        self._seed = seed

    @property
    def config(self) -> dict[str, Any]:
        """The parsed config.json."""
        return self._source.config

    def names(self) -> frozenset[str]:
        """Hugging Face tensor names."""
        return self._source.names()

    def tensor(self, name: str) -> F32:
        """The tensor, rows and columns in their new order."""
        values = self._source.tensor(name)
        if name.endswith(_FFN_IN):
            values = values[self._order(values.shape[0])]
        if name.endswith(_HIDDEN_ROWS):
            values = values[self._order(values.shape[0])]
        elif values.ndim == 2:
            values = values[:, self._order(values.shape[1])]
        if name.endswith(_FFN_OUT):
            values = values[:, self._order(values.shape[1])]
        return np.ascontiguousarray(values)

    def _order(self, size: int) -> I32:
        """One permutation per size: all tensors of one width agree on it."""
        return np.random.default_rng([self._seed, size]).permutation(size).astype(np.int32)
