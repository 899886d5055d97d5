"""While a call copies much, other threads of its process go on."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tests.unit.xccl.ports import SOON_S, TAG, native_ranks
from xdeepserve.xccl import Layout, Port

MANY_BYTES = 4 << 20
LAYOUT = Layout(
    max_ranks=2,
    p2p_slots=4,
    p2p_slot_bytes=MANY_BYTES // 4,
    row_slots=4,
    request_bytes=MANY_BYTES + 4096,
    window_bytes=MANY_BYTES,
)
ROWS = np.zeros((1, MANY_BYTES), np.uint8)
LIMIT_S = 20.0


@pytest.fixture
def pair(run_id: str) -> Iterator[list[Port]]:
    made = native_ranks(run_id, LAYOUT)
    yield made.join(0, 1)
    made.close()


class Other:
    """A thread that runs whenever it is let."""

    def __init__(self) -> None:
        self.turns = 0
        self._is_over = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Other:
        self._interval_s = sys.getswitchinterval()
        sys.setswitchinterval(1000.0)  # from now on a thread runs only when another gives way
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        sys.setswitchinterval(self._interval_s)
        self._is_over = True
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over:
            self.turns += 1
            time.sleep(0)


def post(a: Port, b: Port) -> None:
    with a.exchange(ROWS) as exchange:
        exchange.add(1, tag=TAG)
        exchange.post(SOON_S)
    assert b.poll() == []  # given up: its slot is free again


def wait_no_time(a: Port, b: Port) -> None:
    with a.exchange(ROWS) as exchange:
        exchange.add(1, tag=TAG)
        assert not exchange.is_done()
    assert b.poll() == []


def isend_and_irecv(a: Port, b: Port) -> None:
    message = a.isend(1, bytes(MANY_BYTES))
    assert b.irecv(0, bytearray(MANY_BYTES)).test()
    assert message.test()


CALLS: dict[str, Callable[[Port, Port], None]] = {
    "post": post,
    "is_done": wait_no_time,
    "put": lambda a, b: a.put(1, 0, bytes(MANY_BYTES)),
    "get": lambda a, b: a.get(1, 0, bytearray(MANY_BYTES)),
    "isend and irecv": isend_and_irecv,
}


@pytest.mark.parametrize("call", CALLS)
def test_other_threads_run_meanwhile(pair: list[Port], call: str) -> None:
    a, b = pair
    with Other() as other:
        before, deadline = other.turns, time.monotonic() + LIMIT_S
        while other.turns == before:
            CALLS[call](a, b)
            assert time.monotonic() < deadline, "the interpreter was never let go"
