"""Ring, credits, slots, epochs and lives against the reference: any order of operations agrees."""

from __future__ import annotations

import itertools
import os
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.unit.xccl.ports import Ranks, native_ranks, reference_ranks
from xdeepserve.errors import XcclError
from xdeepserve.xccl import Tag, unlink_all

_NUMBERS = itertools.count()
RANKS = (0, 1, 2)
ranks = st.sampled_from(RANKS)
NOW_S = 0.0


def outcome(call: Any) -> Any:
    """A result, or the type and ranks of an error: what both must agree on."""
    try:
        return call()
    except XcclError as error:
        return type(error), error.ranks
    except ValueError:
        return ValueError


class RingModel(RuleBasedStateMachine):
    """Each rule does one operation on both implementations and compares."""

    @initialize()
    def start(self) -> None:
        self.run_id = f"model{os.getpid()}.{next(_NUMBERS)}"
        self.both: tuple[Ranks, Ranks] = (reference_ranks(), native_ranks(self.run_id))
        for made in self.both:
            made.join(*RANKS)
        self.step_idx = 0
        self.under_way: list[list[Any]] = []
        self.taken: list[list[Any]] = []
        self.sends: dict[tuple[int, int], list[Any]] = {}

    def each(self, call: Any) -> list[Any]:
        """The outcomes of `call(ports, which implementation)`, unfinished sends pushed first."""
        for handles in self.sends.values():
            done = [handle.test() for handle in handles]
            assert done[0] == done[1]
        return [outcome(lambda i=i: call(self.both[i].ports, i)) for i in range(2)]

    def agree(self, call: Any) -> Any:
        first, second = self.each(call)
        assert first == second
        return first

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
        failed = [isinstance(handle, tuple | type) for handle in handles]
        assert failed[0] == failed[1]
        if not any(failed):
            self.sends[a, b] = handles

    @rule(a=ranks, b=ranks, room=st.sampled_from([30, 400, 900]))
    def recv(self, a: int, b: int, room: int) -> None:
        outs = [np.zeros(room, np.uint8) for _ in range(2)]
        got = self.agree(lambda ports, i: ports[a].recv(b, outs[i], NOW_S))
        if isinstance(got, tuple) and isinstance(got[0], int):
            assert np.array_equal(outs[0][: got[0]], outs[1][: got[0]])

    @rule(a=ranks, b=ranks)
    def lend_and_give_back(self, a: int, b: int) -> None:

        def lend(ports: Any, _: int) -> Any:
            data, *rest = ports[a].lend(b, NOW_S)
            return bytes(data), *rest

        got = self.agree(lend)
        if isinstance(got[0], bytes):
            self.agree(lambda ports, _: ports[a].give_back(b))

    @rule(a=ranks, b=ranks, num_rows=st.integers(1, 3))
    def ask(self, a: int, b: int, num_rows: int) -> None:
        self.step_idx += 1
        rows = np.full((num_rows, 4), self.step_idx, np.float32)
        tag = Tag(1, self.step_idx, 0, 0)

        def post(ports: Any, _: int) -> Any:
            exchange = ports[a].exchange(rows)
            exchange.add(b, tag=tag)
            error = outcome(lambda: exchange.post(NOW_S))
            if error is not None:
                exchange.release()
                return error
            return exchange

        results = self.each(post)
        if isinstance(results[0], tuple):
            assert results[0] == results[1]
        else:
            self.under_way.append([a, rows, *results])

    @rule(b=ranks, limit=st.integers(1, 3))
    def poll(self, b: int, limit: int) -> None:
        batches = self.each(lambda ports, _: ports[b].poll(NOW_S, 64))
        described = [
            sorted((x.source_rank, x.tag, x.rows.tolist()) for x in found) for found in batches
        ]
        assert described[0] == described[1]
        by_tag = {batch.tag: batch for batch in batches[1]}
        self.taken += [[batch, by_tag[batch.tag]] for batch in batches[0]]

    @rule(pick=st.integers(0, 50), refuse=st.booleans())
    def answer(self, pick: int, refuse: bool) -> None:
        if not self.taken:
            return
        batches = self.taken.pop(pick % len(self.taken))
        for batch in batches:
            rows = np.array(batch.rows) * np.float32(2)
            _ = batch.refuse(7) if refuse else batch.reply(rows)

    @rule(pick=st.integers(0, 50), then_release=st.booleans())
    def collect(self, pick: int, then_release: bool) -> None:
        if not self.under_way:
            return
        _, rows, *exchanges = self.under_way[pick % len(self.under_way)]
        waited = [outcome(lambda x=x: x.wait(NOW_S)) for x in exchanges]
        assert waited[0] == waited[1]
        assert exchanges[0].parts == exchanges[1].parts
        for replies in zip(*(x.replies() for x in exchanges), strict=True):
            for reply in replies:
                assert np.array_equal(reply.rows, rows * np.float32(2))
        if then_release:
            for exchange in exchanges:
                exchange.release()
            self.under_way.pop(pick % len(self.under_way))

    @rule(rank=ranks)
    def new_life(self, rank: int) -> None:
        """The rank dies with what it held, and joins again."""
        self.under_way = [item for item in self.under_way if item[0] != rank or self.drop(item)]
        self.sends = {pair: h for pair, h in self.sends.items() if rank not in pair}
        self.taken = []
        for made in self.both:
            made.ports[rank].close()
            made.join(rank)

    def drop(self, item: list[Any]) -> bool:
        for exchange in item[2:]:
            exchange.release()
        return False

    @invariant()
    def windows_are_untouched(self) -> None:
        for port in self.both[1].ports.values():
            assert not port.window.any()

    def teardown(self) -> None:
        if hasattr(self, "both"):
            for item in self.under_way:
                self.drop(item)
            for made in self.both:
                made.close()
            unlink_all(self.run_id)


def test_any_order_of_operations_agrees_with_the_reference() -> None:
    run_state_machine_as_test(
        RingModel, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )
