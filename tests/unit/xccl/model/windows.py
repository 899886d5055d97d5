"""Rules for put, get, signal and add, beside a model of every window's content."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from tests.unit.xccl.model.lives import NOW_S, RANKS, is_error, ranks
from tests.unit.xccl.model.messages import Messages
from tests.unit.xccl.ports import SMALL

END = SMALL.window_bytes
offsets = st.sampled_from([0, 3, 8, 24, END - 8, END - 5, END + 1])
"""Of places that overlap, are aligned or not, and reach over the end."""
values = st.sampled_from([0, 1, 3, 2**32 + 1, 2**64 - 2, 2**64 - 1])


class Windows(Messages):
    """A window starts as zeros in each life and holds what was last written to it."""

    def begin(self) -> None:
        super().begin()
        self.windows = {rank: np.zeros(END, np.uint8) for rank in RANKS}

    def forget(self, rank: int) -> None:
        super().forget(rank)
        self.windows[rank] = np.zeros(END, np.uint8)

    def word(self, rank: int, offset: int) -> np.ndarray | None:
        """The u64 of the model at a place; None where there is no such word."""
        if offset % 8 or offset + 8 > END:
            return None
        return self.windows[rank][offset : offset + 8].view(np.uint64)

    @rule(a=ranks, b=ranks, offset=offsets, size=st.integers(0, 40), fill=st.integers(1, 255))
    def put(self, a: int, b: int, offset: int, size: int, fill: int) -> None:
        data = np.arange(fill, fill + size).astype(np.uint8)
        got = self.agree(lambda ports, _: ports[a].put(b, offset, data))
        assert is_error(got) == (offset + size > END)
        if not is_error(got):
            self.windows[b][offset : offset + size] = data

    @rule(a=ranks, b=ranks, offset=offsets, size=st.integers(0, 40))
    def get(self, a: int, b: int, offset: int, size: int) -> None:
        outs = [np.zeros(size, np.uint8) for _ in range(2)]
        got = self.agree(lambda ports, i: ports[a].get(b, offset, outs[i]))
        assert is_error(got) == (offset + size > END)
        if not is_error(got):
            for out in outs:
                assert np.array_equal(out, self.windows[b][offset : offset + size])

    @rule(a=ranks, b=ranks, offset=offsets, value=values)
    def signal(self, a: int, b: int, offset: int, value: int) -> None:
        got = self.agree(lambda ports, _: ports[a].signal(b, offset, value))
        word = self.word(b, offset)
        assert is_error(got) == (word is None)
        if word is not None:
            word[0] = value

    @rule(a=ranks, b=ranks, offset=offsets, value=values)
    def add(self, a: int, b: int, offset: int, value: int) -> None:
        got = self.agree(lambda ports, _: ports[a].add(b, offset, value))
        word = self.word(b, offset)
        assert is_error(got) == (word is None)
        if word is not None:
            word[0] = (int(word[0]) + value) % 2**64

    @rule(a=ranks, offset=offsets, at_least=values, owed=st.sampled_from([(), (1,), (0, 2)]))
    def wait_signal(self, a: int, offset: int, at_least: int, owed: tuple[int, ...]) -> None:
        got = self.agree(lambda ports, _: ports[a].wait_signal(offset, at_least, NOW_S, list(owed)))
        word = self.word(a, offset)
        is_met = word is not None and int(word[0]) >= at_least
        assert is_error(got) == (not is_met)
        if word is not None and is_met:
            assert got == int(word[0])

    @invariant()
    def windows_hold_what_was_written(self) -> None:
        for made in self.both:
            for rank, port in made.ports.items():
                assert np.array_equal(port.window, self.windows[rank])
