"""The two protocols between model files and model code.

A `Checkpoint` gives float32 tensors by their Hugging Face name, whatever the file format. A
`WeightProvider` gives packed weights by our own canonical name. `build_model` asks the provider for
every weight in a fixed order, so one code path both packs a checkpoint into a cache file and maps
it back: the provider calls `load` only when the weight must be packed now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from xdeepserve.ops import F32, Array, WeightDtype
from xdeepserve.ops.types import PackedWeight

LinearLoader = Callable[[], F32 | Iterator[F32]]
"""Yields a linear weight: one [N, K] or [G, N, K] array, or an iterator over the G groups [N, K].

The iterator bounds memory: experts are read, packed and dropped one by one.
"""

ArrayLoader = Callable[[], Array]


class Checkpoint(Protocol):
    """An opened model folder or file. Untrusted input; nothing is executed."""

    @property
    def config(self) -> dict[str, Any]:
        """The parsed config.json (Hugging Face form); GGUF readers synthesise it."""
        ...

    def names(self) -> frozenset[str]:
        """Hugging Face tensor names."""
        ...

    def tensor(self, name: str) -> F32:
        """The tensor dequantised to float32, in Hugging Face orientation ([out, in]).

        Raises:
            ModelFormatError: missing, truncated or damaged.
        """
        ...


class WeightProvider(Protocol):
    """Source of packed weights under canonical names (`layers.3.attention.qkv`)."""

    def linear(self, name: str, load: LinearLoader, dtype: WeightDtype) -> PackedWeight:
        """The packed linear `name`; `load` is called only if it must be packed now."""
        ...

    def array(self, name: str, load: ArrayLoader) -> Array:
        """A small vector or the embedding table, kept in the dtype that `load` returns."""
        ...
