"""irecv: a message is expected while the rank does other things."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.xccl.ports import SMALL, SOON_S, Ranks
from xdeepserve.errors import PeerLost, XcclTimeout

LONG = SMALL.p2p_slot_bytes * SMALL.p2p_slots * 3
"""More bytes than a ring holds."""


def bytes_of(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, size, np.uint8)


@pytest.mark.parametrize("size", [0, 8, 64, 200])
def test_it_is_not_there_until_it_is_sent(native: Ranks, size: int) -> None:
    a, b = native.join(0, 1)
    data, out = bytes_of(size), np.full(300, 0xA5, np.uint8)
    handle = b.irecv(0, out)
    assert not handle.test()
    assert (out == 0xA5).all()
    a.send(1, data, tag=4, timeout_s=SOON_S)
    assert handle.test()
    assert handle.test(), "asking again changes nothing"
    assert handle.wait(SOON_S) == (size, 4)
    assert np.array_equal(out[:size], data)
    assert (out[size:] == 0xA5).all()


def test_wait_takes_what_comes_later(native: Ranks) -> None:
    a, b = native.join(0, 1)
    out = np.zeros(8, np.uint8)
    handle = b.irecv(0, out)
    a.send(1, bytes_of(8), tag=9, timeout_s=SOON_S)
    assert handle.wait(SOON_S) == (8, 9)
    assert np.array_equal(out, bytes_of(8))


def test_two_ranks_exchange_more_than_their_rings_hold(native: Ranks) -> None:
    ports = native.join(0, 1)
    data, outs = [bytes_of(LONG), bytes_of(LONG + 1)], [np.zeros(LONG + 1, np.uint8) for _ in ports]
    receives = [port.irecv(1 - i, outs[i]) for i, port in enumerate(ports)]
    sends = [port.isend(1 - i, data[i]) for i, port in enumerate(ports)]
    rounds, unfinished = 0, [*receives, *sends]
    while unfinished := [handle for handle in unfinished if not handle.test()]:
        rounds += 1
        assert rounds < 100, "each round moves a ring of chunks"
    assert rounds > 0
    assert np.array_equal(outs[0], data[1])
    assert np.array_equal(outs[1][:LONG], data[0])


def test_a_timeout_leaves_the_message_to_the_next_wait(native: Ranks) -> None:
    a, b = native.join(0, 1)
    out = np.zeros(LONG, np.uint8)
    handle = b.irecv(0, out)
    with pytest.raises(XcclTimeout) as caught:
        handle.wait(SOON_S)
    assert caught.value.ranks == (0,)
    sending = a.isend(1, bytes_of(LONG), tag=1)
    with pytest.raises(XcclTimeout):  # a part of it is there by now
        handle.wait(SOON_S)
    while not sending.test():
        handle.test()
    assert handle.wait(SOON_S) == (LONG, 1)
    assert np.array_equal(out, bytes_of(LONG))


def test_a_handle_that_is_dropped_takes_nothing(native: Ranks) -> None:
    a, b = native.join(0, 1)
    out, unused = np.zeros(8, np.uint8), np.zeros(8, np.uint8)
    handle = b.irecv(0, unused)
    assert not handle.test()
    del handle
    a.send(1, bytes_of(8), timeout_s=SOON_S)
    assert b.recv(0, out, timeout_s=SOON_S)[0] == 8
    assert np.array_equal(out, bytes_of(8))
    assert not unused.any()


def test_a_peer_that_left_is_lost_after_its_last_message(native: Ranks) -> None:
    a, b = native.join(0, 1)
    a.send(1, bytes_of(8), timeout_s=SOON_S)
    handles = [b.irecv(0, np.zeros(8, np.uint8)) for _ in range(2)]
    a.close()
    assert handles[0].wait(SOON_S)[0] == 8
    for ask in (lambda: handles[1].wait(SOON_S), handles[1].test):
        with pytest.raises(PeerLost) as caught:
            ask()
        assert caught.value.ranks == (0,)


def test_a_peer_with_a_new_life_is_lost_to_the_handle(native: Ranks) -> None:
    _, b = native.join(0, 1)
    handle = b.irecv(0, np.zeros(8, np.uint8))
    (again,) = native.join(0)
    again.send(1, bytes_of(8), timeout_s=SOON_S)
    for ask in (handle.test, lambda: handle.wait(SOON_S)):
        with pytest.raises(PeerLost, match="new life"):
            ask()
    assert b.recv(0, np.zeros(8, np.uint8), timeout_s=SOON_S)[0] == 8


def test_a_message_too_large_stays_for_a_larger_buffer(native: Ranks) -> None:
    a, b = native.join(0, 1)
    a.send(1, bytes_of(100), timeout_s=SOON_S)
    handle = b.irecv(0, np.zeros(99, np.uint8))
    with pytest.raises(ValueError, match="100 bytes, the buffer 99"):
        handle.test()
    larger = b.irecv(0, np.zeros(100, np.uint8))
    assert larger.test()


def test_a_stranger_and_a_constant_are_refused(native: Ranks) -> None:
    _, b = native.join(0, 1)
    with pytest.raises(ValueError, match="rank 3"):
        b.irecv(3, np.zeros(8, np.uint8))
    with pytest.raises((BufferError, TypeError, ValueError)):
        b.irecv(0, b"constant")
