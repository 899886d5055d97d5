"""Contract of messages and windows: over the reference and the native core."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.xccl.ports import SMALL, SOON_S, Ranks
from xdeepserve.errors import XcclError, XcclTimeout


@pytest.mark.parametrize("size", [0, 1, 8, 32, 33, 64, 65, 200, 256])
def test_a_message_arrives_with_its_tag(ranks: Ranks, size: int) -> None:
    a, b = ranks.join(0, 1)
    data = np.arange(size, dtype=np.uint8)
    out = np.full(300, 0xA5, np.uint8)
    a.send(1, data, tag=77, timeout_s=SOON_S)
    assert b.recv(0, out, timeout_s=SOON_S) == (size, 77)
    assert np.array_equal(out[:size], data)
    assert (out[size:] == 0xA5).all()


def test_messages_of_a_pair_arrive_in_order(ranks: Ranks) -> None:
    a, b = ranks.join(0, 1)
    out = np.zeros(1, np.uint8)
    for first in range(0, 12, 4):
        for i in range(first, first + 4):
            a.send(1, np.array([i], np.uint8), tag=i, timeout_s=SOON_S)
        for i in range(first, first + 4):
            assert b.recv(0, out, timeout_s=SOON_S) == (1, i)
            assert out[0] == i


def test_a_rank_can_send_to_itself(ranks: Ranks) -> None:
    (a,) = ranks.join(0)
    out = np.zeros(3, np.uint8)
    a.send(0, np.arange(3, dtype=np.uint8), timeout_s=SOON_S)
    a.recv(0, out, timeout_s=SOON_S)
    assert out.tolist() == [0, 1, 2]


def test_without_credits_send_times_out_and_says_who_owes(ranks: Ranks) -> None:
    a, b = ranks.join(0, 1)
    for i in range(SMALL.p2p_slots):
        a.send(1, np.array([i], np.uint8), timeout_s=SOON_S)
    with pytest.raises(XcclTimeout) as caught:
        a.send(1, np.array([99], np.uint8), timeout_s=SOON_S)
    assert caught.value.ranks == (1,)
    out = np.zeros(1, np.uint8)
    b.recv(0, out, timeout_s=SOON_S)
    a.send(1, np.array([4], np.uint8), timeout_s=SOON_S)
    received = []
    for _ in range(4):
        b.recv(0, out, timeout_s=SOON_S)
        received.append(int(out[0]))
    assert received == [1, 2, 3, 4]


def test_a_message_given_up_halfway_does_not_disturb_the_next(ranks: Ranks) -> None:
    a, b = ranks.join(0, 1)
    with pytest.raises(XcclTimeout):
        a.send(1, np.zeros(64 * 6, np.uint8), timeout_s=SOON_S)  # six chunks, four slots
    out = np.zeros(400, np.uint8)
    with pytest.raises(XcclTimeout):
        b.recv(0, out, timeout_s=SOON_S)
    a.send(1, np.full(100, 7, np.uint8), tag=5, timeout_s=SOON_S)
    assert b.recv(0, out, timeout_s=SOON_S) == (100, 5)
    assert (out[:100] == 7).all()


def test_a_receive_given_up_halfway_loses_that_message_only(ranks: Ranks) -> None:
    a, b = ranks.join(0, 1)
    out = np.zeros(400, np.uint8)
    handle = a.isend(1, np.zeros(64 * 3, np.uint8))
    assert handle.test()
    for _ in range(2):
        b.lend(0, timeout_s=SOON_S)
        b.give_back(0)
    a.send(1, np.full(9, 3, np.uint8), timeout_s=SOON_S)
    assert b.recv(0, out, timeout_s=SOON_S)[0] == 9


def test_a_message_too_large_for_the_buffer_stays(ranks: Ranks) -> None:
    a, b = ranks.join(0, 1)
    a.send(1, np.arange(100, dtype=np.uint8), timeout_s=SOON_S)
    with pytest.raises(ValueError, match="100"):
        b.recv(0, np.zeros(99, np.uint8), timeout_s=SOON_S)
    out = np.zeros(100, np.uint8)
    assert b.recv(0, out, timeout_s=SOON_S)[0] == 100
    assert np.array_equal(out, np.arange(100))


def test_isend_finishes_as_credits_come_back(ranks: Ranks) -> None:
    a, b = ranks.join(0, 1)
    data = np.arange(64 * 6, dtype=np.uint16)  # twelve chunks, four slots
    handle = a.isend(1, data, tag=3)
    assert not handle.test()
    with pytest.raises(XcclError):
        a.isend(1, data)
    pieces = []
    for index in range(12):
        handle.test()
        piece, chunk_idx, num_chunks, tag, total = b.lend(0, timeout_s=SOON_S)
        assert (chunk_idx, num_chunks, tag, total) == (index, 12, 3, data.nbytes)
        pieces.append(bytes(piece))
        b.give_back(0)
    assert handle.test()
    assert b"".join(pieces) == data.tobytes()


def test_a_lent_chunk_blocks_the_next_receive(ranks: Ranks) -> None:
    a, b = ranks.join(0, 1)
    a.send(1, np.arange(40, dtype=np.uint8), timeout_s=SOON_S)
    assert bytes(b.lend(0, timeout_s=SOON_S)[0]) == bytes(range(40))
    with pytest.raises(XcclError):
        b.recv(0, np.zeros(40, np.uint8), timeout_s=SOON_S)
    b.give_back(0)
    with pytest.raises(ValueError, match="lent"):
        b.give_back(0)


def test_flush_waits_until_all_is_taken(ranks: Ranks) -> None:
    a, b = ranks.join(0, 1)
    a.send(1, np.zeros(8, np.uint8), timeout_s=SOON_S)
    with pytest.raises(XcclTimeout):
        a.flush(1, timeout_s=SOON_S)
    b.recv(0, np.zeros(8, np.uint8), timeout_s=SOON_S)
    a.flush(1, timeout_s=SOON_S)


def test_put_signal_and_get(ranks: Ranks) -> None:
    a, b = ranks.join(0, 1)
    data = np.arange(100, dtype=np.uint8)
    a.put(1, 64, data)
    a.signal(1, 0, 5)
    assert b.wait_signal(0, 5, timeout_s=SOON_S) == 5
    assert np.array_equal(b.window[64:164], data)
    out = np.zeros(100, np.uint8)
    a.get(1, 64, out)
    assert np.array_equal(out, data)
    a.add(1, 0, 2)
    b.add(1, 0, 1)
    assert b.wait_signal(0, 8, timeout_s=SOON_S) == 8
    with pytest.raises(XcclTimeout):
        b.wait_signal(0, 9, timeout_s=SOON_S, owed=[0])


@pytest.mark.parametrize("offset", [4089, 4096, 2**63, 2**64 - 8])
def test_windows_have_ends(ranks: Ranks, offset: int) -> None:
    a, _ = ranks.join(0, 1)
    with pytest.raises(ValueError, match="window"):
        a.put(1, offset, np.zeros(8, np.uint8))
    with pytest.raises(ValueError, match="window"):
        a.get(1, offset, np.zeros(8, np.uint8))
    with pytest.raises(ValueError, match="window"):
        a.signal(1, offset, 1)
