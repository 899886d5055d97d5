"""Which weight gets which precision, by its canonical name.

Norms and biases stay float32 in every precision, and so does the router: choosing another expert
is an error, not noise. In attention, the LM head, and the FFN of the first tenth of the layers and
of the last one activations have outliers that one int8 scale per token cannot hold, and what holds
them is what the operators are fastest with (`Ops.outlier_dtype`). With a scale for every 64
activations (w8a8g64) nothing else is needed: int8 is that everywhere. Where a second product is
cheaper, int8 weights meet activations of 15 bits there (w8a16), and FFN and experts, where the
bytes of a large model are, activations with one scale (int8). Mean KL to float32 over 280 positions
of real text, SmolLM2-135M: 1.0e-2 and 1.3e-2; one scale per token everywhere: 3.8e-2. int4 is for
FFN and experts between those outer layers: off the 4-bit grid of that model (docs/design/ops.md)
the outer FFNs in 4 bits take the mean KL from 9e-2 to 1.4e-1, and attention in 4 bits adds 1.2e-1.
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
        outlier_dtype: as of `Ops`.
    """

    dtype: WeightDtype
    num_layers: int
    outlier_dtype: WeightDtype

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
        is_ffn = ".ffn." in name or ".experts." in name
        if not is_ffn or name.startswith(self._outer_layers):
            return self.outlier_dtype
        if self.dtype is WeightDtype.INT8 and self.outlier_dtype is WeightDtype.W8A8G64:
            return self.outlier_dtype
        return self.dtype

    @property
    def _outer_layers(self) -> tuple[str, ...]:
        outer = (*range(self.num_layers // 10), self.num_layers - 1)
        return tuple(f"layers.{idx}." for idx in outer)
