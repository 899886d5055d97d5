"""Callers that wait briefly, or only ask, learn of a lost rank as those that wait long."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tests.unit.xccl.ports import SMALL, SOON_S, TAG, Ranks, native_ranks, rows_of, serve
from xdeepserve.errors import PeerLost, XcclTimeout
from xdeepserve.xccl import FORWARD, Exchange, Port, Trampoline
from xdeepserve.xccl.trampoline import LOST_DETAIL

FROZEN_AFTER_S = 0.05
LIMIT_S = 20.0
OWNERS = np.array([2, 2], np.int32)
HIDDEN = 4


def until_limit() -> Iterator[int]:
    """Turns of a loop that must be left before the limit."""
    deadline = time.monotonic() + LIMIT_S
    for turn in itertools.count():
        assert time.monotonic() < deadline, "the loss was never noticed"
        yield turn


def ask(port: Port) -> Exchange:
    exchange = port.exchange(rows_of(1, HIDDEN))
    exchange.add(1, tag=TAG)
    return exchange


def without_timeout(call: Callable[[], object]) -> None:
    try:
        call()
    except XcclTimeout:
        return


def repeat(call: Callable[[], object]) -> None:
    """Until it raises anything but a timeout."""
    for _ in until_limit():
        without_timeout(call)


def make_call(port: Port, form: str) -> Callable[[], object]:
    """What is called again and again; it needs rank 1, which does nothing."""
    if form == "irecv":
        return port.irecv(1, bytearray(8)).test
    if form == "isend":
        return port.isend(1, bytes(2 * SMALL.p2p_slots * SMALL.p2p_slot_bytes)).test
    if form == "recv":
        return lambda: port.recv(1, bytearray(8), timeout_s=0.0)
    if form == "wait_signal":
        return lambda: port.wait_signal(0, 1, 0.001, [1])
    exchange = ask(port)
    if form == "is_done":
        return exchange.is_done
    timeout_s = {"wait(0)": 0.0, "wait(4 ms)": 0.004}[form]
    return lambda: exchange.wait(timeout_s)


FORMS = ["wait(0)", "wait(4 ms)", "is_done", "irecv", "isend", "recv", "wait_signal"]


@pytest.mark.parametrize("form", FORMS)
def test_a_peer_that_ended_is_lost(native: Ranks, form: str) -> None:
    a, b = native.join(0, 1)
    call = make_call(a, form)
    without_timeout(call)
    b.close()
    with pytest.raises(PeerLost) as caught:
        repeat(call)
    assert caught.value.ranks == (1,)


@pytest.mark.parametrize("form", FORMS)
def test_a_peer_that_stands_still_is_lost_until_it_moves(run_id: str, form: str) -> None:
    made = native_ranks(run_id, frozen_after_s=FROZEN_AFTER_S)
    a, b = made.join(0, 1)
    call = make_call(a, form)
    with pytest.raises(PeerLost) as caught:
        repeat(call)
    assert caught.value.ranks == (1,)
    b.beat()
    without_timeout(call)
    made.close()


def test_an_answer_that_came_before_the_end_counts(native: Ranks) -> None:
    a, b = native.join(0, 1)
    exchange = ask(a)
    assert not exchange.is_done()
    for batch in b.poll():
        batch.reply(batch.rows.copy())
    b.close()
    a.status_of(1)  # which finds it dead
    assert exchange.is_done()
    exchange.release()


class Forwarding:
    """An asker (rank 0), a trampoline (1) and the owner of all experts (2), which stands still."""

    def __init__(self, made: Ranks) -> None:
        self.asker, self.middle, self.owner = made.join(0, 1, 2)
        self.trampoline = Trampoline(self.middle, hidden_size=HIDDEN)
        self.ids = np.array([[0, 1]], np.int32)

    def ask(self) -> Exchange:
        through = np.full(2, 1, np.int32)
        exchange = self.asker.a2e(
            tag=TAG,
            hidden_states=rows_of(1, HIDDEN),
            topk_ids=self.ids,
            expert_rank=through,
            kind=FORWARD,
        )
        for batch in self.middle.poll():
            self.trampoline.forward(batch, OWNERS)
        return exchange

    def until_refused(self, exchange: Exchange) -> None:
        for _ in until_limit():
            self.middle.wait_any(self.trampoline.exchanges, 0.001, True)
            if self.trampoline.progress():
                break
        (part,) = exchange.parts if exchange.is_done() else ()
        assert (exchange.refused_ranks, part.detail) == ([1], LOST_DETAIL)
        exchange.release()


def test_a_trampoline_refuses_for_an_owner_that_stands_still(run_id: str) -> None:
    made = native_ranks(run_id, frozen_after_s=FROZEN_AFTER_S)
    forwarding = Forwarding(made)
    forwarding.until_refused(forwarding.ask())
    forwarding.owner.beat()  # it goes on
    exchange = forwarding.ask()
    serve(forwarding.owner.poll())  # without what was given up
    assert forwarding.trampoline.progress() == 1
    exchange.release()
    made.close()


def test_a_trampoline_under_load_notices_that_an_owner_ended(native: Ranks) -> None:
    """Requests are always there, so that none of its waits ever lasts."""
    forwarding = Forwarding(native)
    exchange = forwarding.ask()
    with ask(forwarding.asker) as more:
        more.post(LIMIT_S)
        forwarding.owner.close()
        forwarding.until_refused(exchange)


def test_every_rank_that_blocks_a_post_is_looked_at(native: Ranks) -> None:
    """Ranks 1 and 2 have no free slot; it is not the last of them that ends."""
    a, one, _ = native.join(0, 1, 2)
    rows = rows_of(1, 4)
    filled = [a.exchange(rows) for _ in range(SMALL.row_slots)]
    for exchange in filled:
        exchange.add(1, tag=TAG)
        exchange.add(2, tag=TAG)
        exchange.post(SOON_S)
    with a.exchange(rows) as blocked:
        for rank in (1, 2):
            blocked.add(rank, tag=TAG)
        one.close()
        with pytest.raises(PeerLost) as caught:
            blocked.post(1.0)
    assert caught.value.ranks == (1,)
    for exchange in filled:
        exchange.release()
