"""Which weight gets which precision.

Norms, biases and the router stay float32 in every precision: they are small, and a router that
chooses another expert is an error, not noise.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdeepserve.ops import WeightDtype


@dataclass(frozen=True, slots=True, kw_only=True)
class DtypePolicy:
    """Precision by role.

    Attributes:
        linear: projections of attention, FFN and experts.
        absorb: MLA's per-head matrices, small and close to the softmax.
        lm_head: the output matrix.
        embedding: the input table: float32 or bf16.
        router: always float32.
    """

    linear: WeightDtype
    absorb: WeightDtype
    lm_head: WeightDtype
    embedding: WeightDtype
    router: WeightDtype = WeightDtype.FLOAT32


def dtype_policy(dtype: WeightDtype) -> DtypePolicy:
    """The policy behind `--dtype`."""
    exact = dtype is WeightDtype.FLOAT32
    small = WeightDtype.FLOAT32 if exact else WeightDtype.BF16
    return DtypePolicy(linear=dtype, absorb=small, lm_head=dtype, embedding=small)
