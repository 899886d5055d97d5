"""The same products and attention by torch, each on enough copies to come from memory.

bf16: `F.linear` (oneDNN), and oneDNN's product on a weight in its own layout, which is what torch's
compiler makes of it. int8, w8a8g64: dynamically quantized linear, oneDNN where torch chooses
it. int4: torch's product of bf16 rows and int4 weights in groups of 32. w8a16: none. Rows enter in
the type that the way wants.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from types import ModuleType
from typing import Any, Final

import numpy as np
from benchmarks.operators.operands import NUM_VALUES, WeightPart, num_copies

from xdeepserve.models.huge_pages import huge_zeros
from xdeepserve.ops import WeightDtype

Tensor = Any
Product = Callable[[Tensor], Tensor]
"""Rows [T, K] -> [T, N]."""

Pack = Callable[[Tensor], Callable[[], Product]]
"""A weight [N, K] -> what makes a product with a copy of it, each time it is called."""

ProductSet = tuple[list[Product], ...]
"""For each part of a set of weights a product for each of its groups."""

INT4_GROUP: Final = 32
ALIGNMENT: Final = 128
"""Bytes, of where a copy begins."""


class TorchOperands:
    """Makes torch's operands; those of the case before are dropped. Thread: one.

    Args:
        torch: the imported module.
        footprint: bytes that no cache holds.
        num_threads: that torch computes with.
    """

    def __init__(self, torch: ModuleType, footprint: int, num_threads: int) -> None:
        self.torch: Any = torch
        self.footprint = footprint
        self._num_threads = num_threads
        self._values = np.random.default_rng(0).standard_normal(NUM_VALUES, dtype=np.float32)
        self._arena = np.empty(0, np.uint8)
        self._used = 0
        self._parts: tuple[WeightPart, ...] = ()
        self._ways: dict[str, list[ProductSet]] = {}
        torch.set_num_threads(num_threads)

    def values(self, *shape: int) -> Tensor:
        """Normally distributed float32."""
        return self.torch.from_numpy(np.resize(self._values, shape))

    def rows(self, dtype: WeightDtype, *shape: int) -> Tensor:
        """Rows as the products of a precision take them."""
        takes_bf16 = dtype in (WeightDtype.BF16, WeightDtype.INT4)
        return self.values(*shape).bfloat16() if takes_bf16 else self.values(*shape)

    def copies(self, tensor: Tensor) -> list[Tensor]:
        """Copies, `footprint` bytes or a little more."""
        size = _aligned(tensor.numel() * tensor.element_size())
        count = num_copies(self.footprint, size)
        with self._refilled(count * size):
            return [self._copy(tensor) for _ in range(count)]

    def products(self, *parts: WeightPart) -> dict[str, list[ProductSet]]:
        """Copies of products with the weights `parts`, by the name of the way."""
        if parts != self._parts:
            size = sum(weight_bytes(part) for part in parts)
            room = size + sum(2 * ALIGNMENT * part.shape[0] for part in parts)
            count = num_copies(self.footprint, size)
            packs = self._packs(parts[0].dtype)
            with self._refilled(count * room):
                self._ways = {way: self._sets(pack, parts, count) for way, pack in packs.items()}
            self._parts = parts
        return self._ways

    @contextmanager
    def _refilled(self, size: int) -> Iterator[None]:
        """Copies made inside replace those before; one thread makes them: they are small."""
        self._parts, self._ways, self._used = (), {}, 0
        if self._arena.size < size:
            self._arena = huge_zeros((size,), np.dtype(np.uint8))
        self.torch.set_num_threads(1)
        try:
            yield
        finally:
            self.torch.set_num_threads(self._num_threads)

    def _copy(self, tensor: Tensor) -> Tensor:
        """In the arena, whose pages are huge ones as those of our operands are."""
        size = tensor.numel() * tensor.element_size()
        place = self._arena[self._used : self._used + size]
        self._used += _aligned(size)
        copy = self.torch.from_numpy(place).view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)

    def _sets(self, pack: Pack, parts: tuple[WeightPart, ...], count: int) -> list[ProductSet]:
        packed = [[pack(group) for group in self.values(*part.shape)] for part in parts]
        return [tuple([copy() for copy in groups] for groups in packed) for _ in range(count)]

    def _packs(self, dtype: WeightDtype) -> dict[str, Pack]:
        if dtype in (WeightDtype.INT8, WeightDtype.W8A8G64):
            return {"dynamic int8": self._int8}
        if dtype is WeightDtype.INT4:
            return {"int4pack_mm": self._int4}
        if dtype is WeightDtype.FLOAT32:
            return {"linear": self._plain}
        if dtype is WeightDtype.W8A16:
            raise RuntimeError("has no int8 weights with activations of 15 bits")
        return {"linear": self._plain_bf16, "linear, packed": self._onednn_bf16}

    def _plain(self, weight: Tensor) -> Callable[[], Product]:
        linear = self.torch.nn.functional.linear
        return lambda: partial(linear, weight=self._copy(weight))

    def _plain_bf16(self, weight: Tensor) -> Callable[[], Product]:
        return self._plain(weight.bfloat16())

    def _onednn_bf16(self, weight: Tensor) -> Callable[[], Product]:
        values, mkldnn = weight.bfloat16(), self.torch.ops.mkldnn
        reorder = mkldnn._reorder_linear_weight  # noqa: SLF001 - a name of torch's operators
        linear = mkldnn._linear_pointwise.default  # noqa: SLF001
        fused: dict[str, Any] = {"B": None, "attr": "none", "scalars": [], "algorithm": ""}
        return lambda: partial(linear, W=reorder(values, 0), **fused)

    def _int8(self, weight: Tensor) -> Callable[[], Product]:
        torch, quantized_ops = self.torch, self.torch.ops.quantized
        scales = (weight.abs().amax(1) / 127).double()
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():  # torch calls quantized tensors outdated
            warnings.simplefilter("ignore")
            values = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        linear, pack = quantized_ops.linear_dynamic, quantized_ops.linear_prepack
        return lambda: partial(linear, W_prepack=pack(values, None))

    def _int4(self, weight: Tensor) -> Callable[[], Product]:
        torch = self.torch
        n, k = weight.shape
        nibbles = torch.randint(0, 16, (n, k), dtype=torch.int32)
        packed = torch._convert_weight_to_int4pack_for_cpu(nibbles, 1)  # noqa: SLF001
        scales = torch.full((k // INT4_GROUP, n, 2), 0.01, dtype=torch.bfloat16)
        linear = partial(torch._weight_int4pack_mm_for_cpu, qGroupSize=INT4_GROUP)  # noqa: SLF001
        return lambda: partial(linear, mat2=self._copy(packed), qScaleAndZeros=self._copy(scales))


def weight_bytes(part: WeightPart) -> int:
    """Bytes of a weight as torch packs it; int4 has a scale and a zero of 16 bits per group."""
    bits = {WeightDtype.FLOAT32: 32, WeightDtype.BF16: 16, WeightDtype.INT4: 5}
    return prod(part.shape) * bits.get(part.dtype, 8) // 8


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def import_torch() -> tuple[ModuleType | None, str]:
    """(torch, what it is), or (None, why it is not there); it may use huge pages, as we do."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        import torch
    except ImportError as exc:
        return None, f"{exc}; pip install torch==2.13.0"
    has_onednn = "with" if torch.backends.mkldnn.is_available() else "without"
    return torch, f"torch {torch.__version__} {has_onednn} oneDNN"
