"""The base of the model: three ranks in both implementations, their lives, and comparing."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.unit.xccl.ports import AnyPort, Ranks, native_ranks, reference_ranks
from xdeepserve.errors import XcclError
from xdeepserve.xccl import unlink_all

RANKS = (0, 1, 2)
NOW_S = 0.0
ranks = st.sampled_from(RANKS)
_NUMBERS = itertools.count()

Call = Callable[[dict[int, AnyPort], int], Any]


def outcome(call: Callable[[], Any]) -> Any:
    """A result, or the type and ranks of an error: what both must agree on."""
    try:
        return call()
    except XcclError as error:
        return type(error), error.ranks
    except ValueError:
        return ValueError


def is_error(found: Any) -> bool:
    return found is ValueError or (isinstance(found, tuple) and isinstance(found[0], type))


class Lives(RuleBasedStateMachine):
    """Each rule does one operation on both implementations and compares."""

    @initialize()
    def start(self) -> None:
        self.run_id = f"model{os.getpid()}.{next(_NUMBERS)}"
        self.both: tuple[Ranks, Ranks] = (reference_ranks(), native_ranks(self.run_id))
        for made in self.both:
            made.join(*RANKS)
        self.begin()

    def begin(self) -> None:
        """What a part of the model knows at the start; parts extend it."""

    def forget(self, rank: int) -> None:
        """What the end of a life means to a part of the model; parts extend it."""

    def before_each(self) -> None:
        """What both do whenever they are called; parts extend it."""

    def each(self, call: Call) -> list[Any]:
        """Outcomes of `call(ports, which implementation)`: the reference's, the native one's."""
        self.before_each()
        return [outcome(lambda i=i: call(self.both[i].ports, i)) for i in range(2)]

    def agree(self, call: Call) -> Any:
        first, second = self.each(call)
        assert first == second
        return first

    @property
    def native(self) -> dict[int, AnyPort]:
        return self.both[1].ports

    @rule(rank=ranks)
    def new_life(self, rank: int) -> None:
        """The rank dies with what it held, and joins again."""
        self.forget(rank)
        for made in self.both:
            made.ports[rank].close()
            made.join(rank)

    def teardown(self) -> None:
        if hasattr(self, "both"):
            for made in self.both:
                made.close()
            unlink_all(self.run_id)
