"""A rank that uses its port is alive to its peers, whether its calls wait or find all there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from tests.unit.xccl.ports import SOON_S, TAG, Ranks, native_ranks, rows_of
from xdeepserve.xccl import Port

FROZEN_AFTER_S = 0.3
PAUSE_S = 0.01
ROUNDS = 50
"""Pauses that together last longer than FROZEN_AFTER_S."""


VERBS: dict[str, Callable[[Port, Port], object]] = {
    "send": lambda a, b: a.send(1, bytes(8)),
    "recv": lambda a, b: (b.send(0, bytes(8)), a.recv(1, bytearray(8))),
    "lend": lambda a, b: (b.send(0, bytes(8)), a.lend(1), a.give_back(1)),
    "flush": lambda a, b: a.flush(1),
    "isend": lambda a, b: a.isend(1, bytes(8)),
    "irecv": lambda a, b: a.irecv(1, bytearray(8)).test(),
    "put": lambda a, b: a.put(1, 0, bytes(8)),
    "get": lambda a, b: a.get(1, 0, bytearray(8)),
    "signal": lambda a, b: a.signal(1, 8, 1),
    "add": lambda a, b: a.add(1, 16, 1),
    "wait_signal": lambda a, b: a.wait_signal(0, 0),
    "poll": lambda a, b: a.poll(),
    "wait_any": lambda a, b: a.wait_any([], 0.0),
    "beat": lambda a, b: a.beat(),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_a_heartbeat(native: Ranks, verb: str) -> None:
    a, b = native.join(0, 1)
    b.status_of(0)
    assert b.status_of(0).silence_s > 0.0
    VERBS[verb](a, b)
    assert b.status_of(0).silence_s == 0.0


def test_asking_and_answering_are_heartbeats(native: Ranks) -> None:
    a, b = native.join(0, 1)

    def check(caller: Port, other: Port, call: Callable[[], object]) -> None:
        other.status_of(caller.rank)
        call()
        assert other.status_of(caller.rank).silence_s == 0.0

    with a.exchange(rows_of(1, 4)) as exchange:
        check(a, b, lambda: exchange.add(1, tag=TAG))
        check(a, b, lambda: exchange.post(SOON_S))
        (batch,) = b.poll()
        check(b, a, lambda: batch.reply(rows_of(1, 4)))
        check(a, b, exchange.is_done)
        check(a, b, lambda: exchange.wait(SOON_S))
        check(a, b, exchange.release)


def test_a_sender_that_pauses_after_each_message_is_alive(run_id: str) -> None:
    made = native_ranks(run_id, frozen_after_s=FROZEN_AFTER_S)
    a, b = made.join(0, 1)

    def send_slowly() -> None:
        for _ in range(ROUNDS):
            time.sleep(PAUSE_S)
            a.send(1, bytes(8))

    sending = threading.Thread(target=send_slowly)
    sending.start()
    for _ in range(ROUNDS):
        b.recv(0, bytearray(8))
    sending.join()
    made.close()


def test_a_receiver_that_works_on_each_message_is_alive(run_id: str) -> None:
    """It always finds a message there; its sender is the one that waits."""
    made = native_ranks(run_id, frozen_after_s=FROZEN_AFTER_S)
    a, b = made.join(0, 1)

    def receive_slowly() -> None:
        for _ in range(ROUNDS):
            time.sleep(PAUSE_S)
            b.recv(0, bytearray(8))

    receiving = threading.Thread(target=receive_slowly)
    receiving.start()
    for _ in range(ROUNDS):
        a.send(1, np.zeros(8, np.uint8))
    receiving.join()
    made.close()
