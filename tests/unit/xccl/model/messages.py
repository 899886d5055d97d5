"""Rules for point-to-point messages: rings and credits."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests.unit.xccl.model.lives import NOW_S, Lives, is_error, ranks


class Messages(Lives):
    """Streams between all ordered pairs; a receiver may lend a chunk instead of copying it."""

    def begin(self) -> None:
        super().begin()
        self.sends: dict[tuple[int, int], list[Any]] = {}

    def forget(self, rank: int) -> None:
        super().forget(rank)
        self.sends = {pair: h for pair, h in self.sends.items() if rank not in pair}

    def before_each(self) -> None:
        """Unfinished sends are pushed by every call of the native port; so by the reference."""
        for handles in self.sends.values():
            first, second = (handle.test() for handle in handles)
            assert first == second

    @rule(a=ranks, b=ranks, size=st.integers(0, 400), tag=st.integers(0, 9))
    def send(self, a: int, b: int, size: int, tag: int) -> None:
        data = ((np.arange(size) + tag) % 256).astype(np.uint8)
        self.agree(lambda ports, _: ports[a].send(b, data, tag, NOW_S))

    @rule(a=ranks, b=ranks, size=st.integers(0, 900))
    def isend(self, a: int, b: int, size: int) -> None:
        if a == b:
            size = min(size, 256)  # a rank that receives from itself pushes meanwhile
        data = (np.arange(size) % 256).astype(np.uint8)
        handles = self.each(lambda ports, _: ports[a].isend(b, data, 5))
        assert is_error(handles[0]) == is_error(handles[1])
        if not is_error(handles[0]):
            self.sends[a, b] = handles

    @rule(a=ranks, b=ranks, room=st.sampled_from([30, 400, 900]))
    def recv(self, a: int, b: int, room: int) -> None:
        outs = [np.zeros(room, np.uint8) for _ in range(2)]
        got = self.agree(lambda ports, i: ports[a].recv(b, outs[i], NOW_S))
        if not is_error(got):
            assert np.array_equal(outs[0][: got[0]], outs[1][: got[0]])

    @rule(a=ranks, b=ranks)
    def lend_and_give_back(self, a: int, b: int) -> None:
        def lend(ports: Any, _: int) -> Any:
            data, *rest = ports[a].lend(b, NOW_S)
            return bytes(data), *rest

        if not is_error(self.agree(lend)):
            self.agree(lambda ports, _: ports[a].give_back(b))

    @rule(a=ranks, b=ranks)
    def flush(self, a: int, b: int) -> None:
        self.agree(lambda ports, _: ports[a].flush(b, NOW_S))
