"""What a case is: one operator on one shape, and how its operands are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.operators.operands import Operands, StepShape
from benchmarks.operators.roofline import Work
from benchmarks.operators.torch_operands import TorchOperands

from xdeepserve.ops import WeightDtype

Calls = list[Callable[[], object]]
"""The same operator on one copy of the operands after the other."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Calls that are ready to be timed, and what each of them has to do."""

    calls: Calls
    work: Work


@dataclass(frozen=True, slots=True)
class Sizes:
    """Which sizes each operator is measured at.

    Attributes:
        decode: sequences of a step that decodes, one token each.
        prefill: tokens of one sequence that is prefilled, at the end of its context.
        contexts: tokens of a sequence; a prefilled one has at least `prefill`.
        dtypes: of weights that are served in several precisions.
    """

    decode: tuple[int, ...] = (1, 8, 32, 64)
    prefill: int = 512
    contexts: tuple[int, ...] = (256, 4096)
    dtypes: tuple[WeightDtype, ...] = (
        WeightDtype.BF16,
        WeightDtype.W8A16,
        WeightDtype.W8A8G64,
        WeightDtype.INT8,
        WeightDtype.INT4,
    )

    @property
    def tokens(self) -> tuple[int, ...]:
        """Rows of an operator that knows no sequences."""
        return (*self.decode, self.prefill)

    def steps(self) -> Iterator[StepShape]:
        """Every batch of sequences."""
        for context in self.contexts:
            for num_sequences in self.decode:
                yield StepShape(num_sequences, 1, context)
        for context in sorted({max(self.prefill, context) for context in self.contexts}):
            yield StepShape(1, self.prefill, context)


TINY_SIZES = Sizes(decode=(1, 8), prefill=16, contexts=(32,))


@dataclass(frozen=True, slots=True)
class Case:
    """One operator on one shape.

    Attributes:
        operator: its name in `Ops`.
        what: which weight, or which variant.
        tokens: rows; None = there are none, only a weight.
        context: tokens of each sequence; None = the operator knows no sequences.
        dtype: of the weights; "" = there are none.
        prepare: makes the operands.
        torch: the same by torch, each way by its name; None = torch has no such operator.
    """

    operator: str
    what: str
    tokens: int | None
    context: int | None
    dtype: str
    prepare: Callable[[Operands], Prepared]
    torch: Callable[[TorchOperands], dict[str, Calls]] | None = None
