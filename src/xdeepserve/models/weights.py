"""Weights: what the units are built from - provider, checkpoint and precision in one hand.

Tensors are named twice: `ours` is the canonical name the provider knows, `theirs` the Hugging Face
name in the checkpoint. Every tensor's shape is checked against the spec before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from xdeepserve.errors import ModelFormatError
from xdeepserve.models.checkpoint_api import (
    ArrayLoader,
    Checkpoint,
    LinearLoader,
    WeightProvider,
)
from xdeepserve.models.quantize import DtypePolicy
from xdeepserve.ops import F32, Array, Ops, PackedWeight, WeightDtype
from xdeepserve.ops.types import U8

Rows = list[tuple[str, int]]
"""Tensors below each other: (name without .weight or .bias, number of rows)."""


class InMemoryProvider:
    """The simplest WeightProvider: packs everything now and keeps it in memory."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def linear(self, name: str, load: LinearLoader, dtype: WeightDtype) -> PackedWeight:
        """Pack what `load` gives; groups that come one by one are packed one by one."""
        loaded = load()
        if isinstance(loaded, np.ndarray):
            return self._ops.pack(loaded, dtype=dtype)
        return join_groups([self._ops.pack(group, dtype=dtype) for group in loaded])

    def array(self, name: str, load: ArrayLoader) -> Array:
        """What `load` gives."""
        return load()


def join_groups(groups: list[PackedWeight]) -> PackedWeight:
    """One weight [G, N, K] of G packed weights [1, N, K] (copies)."""
    first = groups[0]
    total = sum(group.data.size for group in groups)
    data = aligned_bytes(total)
    np.concatenate([group.data for group in groups], out=data)
    return PackedWeight(first.layout, first.dtype, (len(groups), *first.shape[1:]), data)


def aligned_bytes(size: int) -> U8:
    """`size` uninitialised bytes that start on a 64-byte border, as packed weights must."""
    raw = np.empty(size + 63, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


class Weights:
    """Asks the provider for weights; reads the checkpoint only when the provider wants it.

    Without a checkpoint every weight must be packed already, and a read means the cache lacks one.
    """

    def __init__(
        self, provider: WeightProvider, checkpoint: Checkpoint | None, policy: DtypePolicy
    ) -> None:
        self.provider = provider
        self.policy = policy
        self._checkpoint = checkpoint
        self._names = frozenset[str]() if checkpoint is None else checkpoint.names()

    def read(self, name: str, *shape: int) -> F32:
        """The float32 tensor `name`, C-contiguous.

        Raises:
            ModelFormatError: missing, damaged, or of another shape.
        """
        if self._checkpoint is None:
            raise ModelFormatError(
                f"the packed weights lack what tensor {name!r} gives; delete the cache file and "
                "load the model folder again"
            )
        tensor = self._checkpoint.tensor(name)
        if tensor.shape != shape:
            raise ModelFormatError(
                f"tensor {name!r} has shape {list(tensor.shape)}, config.json says {list(shape)}"
            )
        return np.ascontiguousarray(tensor, dtype=np.float32)

    def stack(self, rows: Rows, columns: int) -> F32:
        """[sum of rows, columns]: the weights named by `rows` below each other."""
        return np.concatenate([self.read(f"{name}.weight", size, columns) for name, size in rows])

    def packed(self, ours: str, load: LinearLoader) -> PackedWeight:
        """The packed linear `ours`, in the precision that the policy gives it."""
        return self.provider.linear(ours, load, self.policy.linear(ours))

    def linear(self, ours: str, rows: Rows, columns: int) -> PackedWeight:
        """The packed stack of `rows`."""
        return self.packed(ours, lambda: self.stack(rows, columns))

    def bias(self, ours: str, rows: Rows) -> F32:
        """The biases named by `rows`, one after the other."""

        def load() -> Array:
            return np.concatenate([self.read(f"{name}.bias", size) for name, size in rows])

        return self.provider.array(ours, load)

    def vector(self, ours: str, theirs: str, size: int) -> F32:
        """A float32 vector, for example a norm."""
        return self.provider.array(ours, lambda: self.read(theirs, size))

    def experts(self, ours: str, fused: str, experts: list[Rows], columns: int) -> PackedWeight:
        """[E, N, columns]: one stack of rows per expert, one in memory at a time.

        Checkpoints store a tensor per expert and projection; some store all experts in one tensor
        `fused` [E, N, columns], which is used when it is there.
        """

        def load() -> Iterator[F32]:
            if fused in self._names:
                height = sum(size for _, size in experts[0])
                yield from self.read(fused, len(experts), height, columns)
                return
            for rows in experts:
                yield self.stack(rows, columns)

        return self.packed(ours, load)
