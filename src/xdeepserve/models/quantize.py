"""Which weight gets which precision, by its canonical name.

Norms and biases stay float32 in every precision, and so does the router: choosing another expert
is an error, not noise. int8 is for FFN and experts, where the bytes of a large model are. In
attention, the LM head, and the FFN of the first tenth of the layers and of the last one activations
have outliers that one int8 scale per token cannot hold, so there the weights are int8 and the
activations have 15 bits (w8a16). int4 is for the weights that are int8 under int8: in SmolLM2-135M
off its 4-bit grid (docs/design/ops.md) the outer FFNs in 4 bits take the mean KL of the next-token
distribution to float32 from 9e-2 to 1.4e-1, and attention in 4 bits adds 1.2e-1.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdeepserve.ops import WeightDtype


@dataclass(frozen=True, slots=True)
class DtypePolicy:
    """The meaning of `--dtype`.

    Attributes:
        dtype: the precision class asked for.
        num_layers: of the model; decides which layers are the first and the last.
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
        if self.dtype not in (WeightDtype.INT8, WeightDtype.INT4):
            return self.dtype
        if ".ffn." not in name and ".experts." not in name:
            return WeightDtype.W8A16
        return WeightDtype.W8A16 if name.startswith(self._outer_layers) else self.dtype

    @property
    def _outer_layers(self) -> tuple[str, ...]:
        outer = (*range(self.num_layers // 10), self.num_layers - 1)
        return tuple(f"layers.{idx}." for idx in outer)
