"""What a KV cache holds per token, and its arrays."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from xdeepserve.errors import ConfigError
from xdeepserve.models.huge_pages import huge_zeros
from xdeepserve.models.spec import ModelSpec
from xdeepserve.ops import Array, KVLayer, WeightDtype


class KVDtype(StrEnum):
    """Precision of keys and values."""

    FLOAT32 = "float32"
    BF16 = "bf16"
    INT8 = "int8"
    """A float32 scale for each key and each value of a head, its largest magnitude / 127."""

    @property
    def array_dtype(self) -> np.dtype[np.generic]:
        """Of the arrays; bfloat16 bits are uint16."""
        types = {KVDtype.FLOAT32: np.float32, KVDtype.BF16: np.uint16, KVDtype.INT8: np.int8}
        return np.dtype(types[self])


@dataclass(frozen=True, slots=True)
class KVFormat:
    """The caches of a model.

    Raises:
        ConfigError: int8 for a model with latent attention.
    """

    spec: ModelSpec
    dtype: KVDtype

    def __post_init__(self) -> None:
        if self.dtype is KVDtype.INT8 and self._is_latent:
            raise ConfigError(
                f"kv_cache_dtype='int8' is not for {self.spec.family} models: their latent "
                "attention caches a small latent instead of keys and values; use 'auto'"
            )

    @classmethod
    def of(cls, spec: ModelSpec, weights: WeightDtype, asked: str = "auto") -> KVFormat:
        """The format `asked` for; auto is bf16, or float32 where the weights are."""
        if asked == "auto":
            exact = weights is WeightDtype.FLOAT32
            return cls(spec, KVDtype.FLOAT32 if exact else KVDtype.BF16)
        return cls(spec, KVDtype(asked))

    @property
    def _is_latent(self) -> bool:
        return self.spec.attention.num_kv_arrays == 1

    @property
    def bytes_per_token(self) -> int:
        """Of all layers."""
        num_bytes = self.spec.kv_values_per_token() * self.dtype.array_dtype.itemsize
        if self.dtype is KVDtype.INT8:
            heads, _ = self.spec.attention.kv_heads_and_dim
            num_bytes += self.spec.num_layers * heads * 2 * np.dtype(np.float32).itemsize
        return num_bytes

    def new_layer(self, num_blocks: int, block_size: int) -> KVLayer:
        """Zeroed cache of one layer, see `huge_zeros`: committed when it is first written."""
        heads, dim = self.spec.attention.kv_heads_and_dim

        def array(*shape: int, dtype: np.dtype[np.generic] = self.dtype.array_dtype) -> Array:
            return huge_zeros((num_blocks, heads, *shape), dtype)

        if self._is_latent:
            return KVLayer(array(block_size, dim), None)
        scales = None
        if self.dtype is KVDtype.INT8:
            scales = array(2, block_size, dtype=np.dtype(np.float32))
        return KVLayer(array(dim, block_size), array(block_size, dim), scales)
