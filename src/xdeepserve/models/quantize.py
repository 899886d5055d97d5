"""Which weight gets which precision, by its canonical name.

Norms and biases stay float32 in every precision, and so does the router: choosing another expert is
an error, not noise. In int8 two kinds of weight stay bf16, because they carry most of its loss and
few of its bytes (SmolLM2-135M on real text, mean KL of the next-token distribution to float32: all
int8 3.3e-2, so chosen 1.7e-2, weights alone 4e-3): what feeds a softmax of positions, and the last
layer, whose activations have the largest outliers and which no later layer evens out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from xdeepserve.ops import WeightDtype

_BF16_IN_INT8: Final = (".attention.qkv", ".attention.key_absorb", ".attention.value_absorb")


@dataclass(frozen=True, slots=True)
class DtypePolicy:
    """The meaning of `--dtype`.

    Attributes:
        dtype: the precision class asked for.
        num_layers: of the model; decides which layer is the last.
    """

    dtype: WeightDtype
    num_layers: int

    @property
    def embedding(self) -> WeightDtype:
        """The input table: float32 or bf16."""
        is_exact = self.dtype is WeightDtype.FLOAT32
        return WeightDtype.FLOAT32 if is_exact else WeightDtype.BF16

    def linear(self, name: str) -> WeightDtype:
        """Precision of the linear `name`, for example `layers.3.attention.qkv`."""
        if name.endswith(".router.weight"):
            return WeightDtype.FLOAT32
        if self.dtype is not WeightDtype.INT8:
            return self.dtype
        is_last_layer = name.startswith(f"layers.{self.num_layers - 1}.")
        if is_last_layer or name.endswith(_BF16_IN_INT8):
            return WeightDtype.BF16
        return WeightDtype.INT8
