"""What only the native port has: alignment, rounding, traces, waking, integrity, lying messages."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from unittest.mock import Mock

import numpy as np
import pytest

from tests.unit.xccl.ports import SOON_S, TAG, Ranks, native_ranks, rows_of
from xdeepserve.errors import IntegrityError, SegmentError, XcclError
from xdeepserve.ops.quant import quantize_int8, round_bf16, to_bf16
from xdeepserve.xccl import Exchange, Layout, PartState, PeerState, Port, TraceKind
from xdeepserve.xccl import port as port_module
from xdeepserve.xccl.reference_rows import quantize_rows
from xdeepserve.xccl.segments import list_segments

WIDE = Layout(max_ranks=2, request_bytes=64 << 10, reply_bytes=64 << 10)


@pytest.fixture
def pair(run_id: str) -> Iterator[list[Port]]:
    made = native_ranks(run_id, WIDE)
    yield made.join(0, 1)
    made.close()


@pytest.mark.parametrize("shift", [0, 1, 7, 33])
@pytest.mark.parametrize("size", [1023, 1025, 16384, 16385, 65536, 300_001])
def test_buffers_need_no_alignment(pair: list[Port], size: int, shift: int) -> None:
    a, b = pair
    data = np.random.default_rng(size).integers(0, 256, size + shift, dtype=np.uint8)
    out = np.full(size + shift + 64, 0xA5, np.uint8)
    a.send(1, data[shift:])
    assert b.recv(0, out[shift:])[0] == size
    assert np.array_equal(out[shift : shift + size], data[shift:])
    assert (out[shift + size :] == 0xA5).all()


def test_unaligned_windows(pair: list[Port]) -> None:
    a, b = pair
    data = np.random.default_rng(0).integers(0, 256, 5003, dtype=np.uint8)
    a.put(1, 1001, data[1:])
    out = np.zeros(5002, np.uint8)
    a.get(1, 1001, out)
    assert np.array_equal(out, data[1:])
    assert np.array_equal(b.window[1001:6003], data[1:])


@pytest.mark.parametrize("width", [1, 15, 16, 17, 576])
def test_fused_quantization_rounds_as_the_operators_do(pair: list[Port], width: int) -> None:
    a, b = pair
    rows = rows_of(9, width, seed=width)
    rows[1] *= np.float32(2.0**-120)
    rows[2] = np.float32(1e30)
    rows[3] = np.linspace(-127, 127, width, dtype=np.float32) + np.float32(0.5)
    for sent, exact in ((rows, rows), (to_bf16(rows), round_bf16(rows))):
        expected, scales = quantize_int8(exact)
        with a.exchange(sent, quantize=True) as exchange:
            exchange.add(1, tag=TAG)
            exchange.post(SOON_S)
            (batch,) = b.poll()
            assert batch.scales is not None
            assert np.array_equal(batch.rows, expected)
            assert np.array_equal(batch.scales, scales)
            batch.reply(np.zeros((1, 1), np.float32))
    assert all(map(np.array_equal, quantize_rows(rows), quantize_int8(rows)))


def test_answers_can_be_computed_in_place(pair: list[Port]) -> None:
    a, b = pair
    with a.exchange(rows_of(2, 8)) as exchange:
        exchange.add(1, tag=TAG)
        exchange.post(SOON_S)
        (batch,) = b.poll()
        out = batch.answer_buffer(3, 5)
        assert out is not None
        out[:] = rows_of(3, 5, seed=1)
        assert not exchange.is_done()
        assert batch.commit(3, 5)
        exchange.wait(SOON_S)
        assert np.array_equal(exchange.replies()[0].rows, rows_of(3, 5, seed=1))


def test_an_answer_to_a_life_that_ended_is_dropped(native: Ranks) -> None:
    a, server = native.join(0, 1)
    exchange = a.exchange(rows_of(1, 4))
    exchange.add(1, tag=TAG)
    exchange.post(SOON_S)
    (batch,) = server.poll()
    native.join(0)
    assert batch.reply(rows_of(1, 4)) is False
    assert batch.answer_buffer(1, 4) is None
    assert server.num_open_requests == 0


def test_transfers_leave_records(pair: list[Port]) -> None:
    a, b = pair
    for port in pair:
        port.open_trace(8)
    a.send(1, np.zeros(100, np.uint8), tag=6)
    b.recv(0, np.zeros(100, np.uint8))
    with a.exchange(rows_of(2, 8)) as exchange:
        exchange.add(1, tag=TAG)
        exchange.post(SOON_S)
        for batch in b.poll():
            batch.reply(rows_of(2, 8))
        exchange.wait(SOON_S)
    asked, served = a.trace_records(), b.trace_records()
    assert [record.kind for record in asked] == [TraceKind.SEND, TraceKind.REQUEST]
    assert [record.kind for record in served] == [TraceKind.RECV, TraceKind.SERVE]
    assert (asked[0].tag, asked[0].num_bytes, asked[0].peer) == (6, 100, 1)
    assert (served[1].tag, served[1].layer_idx, served[1].microbatch_idx) == (7, 3, 1)
    for record in [*asked, *served]:
        assert 0 < record.enqueue_ns <= record.visible_ns <= record.done_ns
    assert a.trace_records() == []


def test_verbs_on_windows_leave_records(pair: list[Port]) -> None:
    a, _ = pair
    a.put(1, 64, np.zeros(100, np.uint8))
    a.open_trace(8)
    a.put(1, 64, np.zeros(100, np.uint8))
    a.get(1, 8, np.zeros(24, np.uint8))
    a.signal(1, 16, 5)
    a.add(0, 0, 1)
    with pytest.raises(ValueError, match="window"):
        a.signal(1, 2**63, 1)
    records = a.trace_records()
    assert [(r.kind, r.peer, r.tag, r.num_bytes) for r in records] == [
        (TraceKind.PUT, 1, 64, 100),
        (TraceKind.GET, 1, 8, 24),
        (TraceKind.SIGNAL, 1, 16, 8),
        (TraceKind.ADD, 0, 0, 8),
    ]
    for record in records:
        assert 0 < record.enqueue_ns <= record.visible_ns <= record.done_ns


def test_a_trace_keeps_the_newest(pair: list[Port]) -> None:
    a, _ = pair
    a.open_trace(3)
    for tag in range(5):
        a.send(1, b"x", tag)
    assert [record.tag for record in a.trace_records()] == [2, 3, 4]


def test_a_port_is_used_by_one_thread_at_a_time(pair: list[Port]) -> None:
    a, b = pair
    out = bytearray(3)
    thread = threading.Thread(target=lambda: a.recv(1, out, timeout_s=20.0))
    thread.start()
    with pytest.raises(XcclError, match="one thread"):
        poll_until_refused(a)
    a.beat()  # these two may be called from anywhere
    a.ring_self()
    b.send(0, b"now")
    thread.join()
    assert out == b"now"


def poll_until_refused(port: Port) -> None:
    while True:
        port.poll()


def test_wait_any_tells_news_from_silence(pair: list[Port]) -> None:
    a, b = pair
    with a.exchange(rows_of(1, 4)) as exchange:
        exchange.add(1, tag=TAG)
        exchange.post(SOON_S)
        assert not a.wait_any([exchange], SOON_S)
        assert b.wait_any([], SOON_S, True)
        for batch in b.poll():
            batch.reply(rows_of(1, 4))
        assert a.wait_any([exchange], SOON_S)


def test_what_cannot_be_waited_for_is_refused(pair: list[Port]) -> None:
    a, b = pair
    topk_ids = np.zeros((1, 1), np.int32)
    exchange = a.exchange(rows_of(1, 4))
    exchange.post_routed(topk_ids, np.ones(1, np.int32), TAG, 0, SOON_S)
    out, weights = np.zeros((1, 4), np.float32), np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match="another port"):
        b.wait_any([exchange], SOON_S)
    with pytest.raises(TypeError, match="None"):
        a.wait_any([exchange, None], SOON_S)  # type: ignore[list-item]
    exchange.release()
    for call in (
        lambda: a.wait_any([exchange], SOON_S),
        lambda: exchange.gather(out),
        lambda: exchange.combine(weights, out),
    ):
        with pytest.raises(XcclError, match="released"):
            call()


def test_a_segment_that_is_replaced_while_it_is_opened_is_found_later(
    pair: list[Port], run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (listed,) = (info for info in list_segments(run_id) if info.rank == 1)
    old = dataclasses.replace(listed, incarnation=listed.incarnation + 1)  # unknown to rank 0
    refuse = pytest.raises(SegmentError, match="in vain")
    monkeypatch.setattr(Port, "attach", _attach_in_vain)
    for now, expectation in (([listed], nullcontext()), ([old], refuse)):
        answers = Mock(side_effect=[[old], now])
        monkeypatch.setattr(port_module, "list_segments", answers)
        with expectation:
            assert pair[0].discover() == [1]


def _attach_in_vain(self: Port, blob: bytes) -> None:
    raise SegmentError("in vain")


def test_open_slots_and_requests_are_no_idle_port(pair: list[Port]) -> None:
    a, b = pair
    exchange = a.exchange(rows_of(1, 4))
    exchange.add(1, tag=TAG)
    exchange.post(SOON_S)
    (batch,) = b.poll()
    for port in pair:
        with pytest.raises(IntegrityError, match="not idle"):
            port.check_integrity()
    batch.reply(rows_of(1, 4))
    exchange.wait(SOON_S)
    exchange.release()
    for port in pair:
        port.check_integrity()


@pytest.mark.parametrize(
    "send",
    [
        lambda exchange: exchange.post(SOON_S),
        lambda exchange: exchange.wait(SOON_S),
        lambda exchange: exchange.is_done(),
    ],
    ids=["post", "wait", "is_done"],
)
def test_rows_that_do_not_fit_are_refused_with_the_limit(
    pair: list[Port], send: Callable[[Exchange], object]
) -> None:
    a, b = pair
    big = np.zeros((200, 100), np.float32)
    exchange = a.exchange(big)
    exchange.add(1, tag=TAG)
    with pytest.raises(ValueError, match="request_bytes=65536"):
        send(exchange)
    assert a.wait_any([exchange], SOON_S), "there is nothing to wait for"
    exchange.release()
    with a.exchange(rows_of(1, 4)) as small:
        small.add(1, tag=TAG)
        small.post(SOON_S)
        (batch,) = b.poll()
        with pytest.raises(ValueError, match="reply_bytes=65536"):
            batch.reply(big)
        batch.refuse()


@pytest.mark.parametrize(
    ("offset", "value"),
    [(44, 2**32 - 1), (40, 2**32 - 1), (48, 2**31), (38, 9)],
    ids=["row_bytes", "num_rows", "num_meta", "row_type"],
)
def test_a_request_whose_header_lies_is_refused(pair: list[Port], offset: int, value: int) -> None:
    """The asker's own memory is changed behind its back, as by a wild pointer."""
    a, b = pair
    with a.exchange(rows_of(1, 4)) as exchange:
        exchange.add(1, tag=TAG)
        exchange.post(SOON_S)
        bytes_of_a = a.own_bytes()
        head = int(np.flatnonzero(find_header(bytes_of_a))[0]) * 64
        size = 2 if offset == 38 else 4
        raw = int(value).to_bytes(size, "little")
        bytes_of_a[head + offset : head + offset + size] = np.frombuffer(raw, np.uint8)
        assert b.poll() == []
        exchange.wait(SOON_S)
        (part,) = exchange.parts
        assert (part.state, part.detail) == (PartState.REFUSED, 0xFFFF_FFFF)


@pytest.mark.parametrize("size", [4095, 4096, 5000, 65_536, 65_537, 300_001])
def test_messages_arrive_wherever_the_buffer_lies_in_its_page(pair: list[Port], size: int) -> None:
    """Copies of other kinds for targets that lie just behind their source in a page."""
    a, b = pair
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    room = np.zeros(size + 3 * 4096, np.uint8)
    page = -room.ctypes.data % 4096
    for offset in (0, 1, 16, 63, 64, 2048, 4095):
        room[:] = 0xA5
        out = room[page + offset : page + offset + size]
        a.send(1, data, timeout_s=SOON_S)
        b.recv(0, out, timeout_s=SOON_S)
        assert np.array_equal(out, data)
        assert (room[: page + offset] == 0xA5).all()
        assert (room[page + offset + size :] == 0xA5).all()


def find_header(segment: np.ndarray) -> np.ndarray:
    """Which lines of a segment are request headers: seq 1, step 7, epoch 1, layer 3."""
    words = segment.view(np.uint64).reshape(-1, 8)
    tail = np.uint64(TAG.epoch | TAG.layer_idx << 32 | TAG.microbatch_idx << 48)
    return (words[:, 0] == 1) & (words[:, 1] == TAG.step_idx) & (words[:, 2] == tail)


def test_status_of_peers(native: Ranks) -> None:
    a, b = native.join(0, 1)
    assert a.status_of(3).state is PeerState.ABSENT
    status = a.status_of(1)
    assert (status.state, status.incarnation) == (PeerState.ALIVE, b.incarnation)
    b.close()
    assert a.status_of(1).state is PeerState.DEAD
    (again,) = native.join(1)
    assert a.status_of(1).incarnation == again.incarnation > b.incarnation


def test_lives_are_numbered_by_the_clock_that_is_never_set(run_id: str) -> None:
    """By the time of day, a life after a step back would look older than the one it replaces."""
    for _ in range(2):
        before = time.monotonic_ns() // 1000
        with Port(run_id, "r0", 0, layout=WIDE) as port:
            assert before <= port.incarnation <= time.monotonic_ns() // 1000


def test_timeouts_are_numbers(native: Ranks) -> None:
    a, _ = native.join(0, 1)
    for timeout_s in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="timeout_s"):
            a.recv(1, bytearray(1), timeout_s=timeout_s)
