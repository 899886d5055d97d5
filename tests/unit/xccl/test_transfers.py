"""What an observer reads in the segments of a run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.unit.xccl.ports import SMALL, SOON_S, TAG, Ranks, native_ranks, serve
from xdeepserve.errors import SegmentError
from xdeepserve.xccl import (
    Exchange,
    Layout,
    Port,
    Transfer,
    TransferKind,
    list_segments,
    read_transfers,
)

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)
OWNERS = np.array([1, 2], np.int32)
IDS = np.array([[0], [1], [0]], np.int32)


@pytest.fixture
def made(run_id: str) -> Iterator[Ranks]:
    ranks = native_ranks(run_id)
    ranks.join(0, 1, 2)
    yield ranks
    ranks.close()


def ask(port: Port, step_idx: int = 7) -> Exchange:
    return port.a2e(
        tag=TAG._replace(step_idx=step_idx), hidden_states=ROWS, topk_ids=IDS, expert_rank=OWNERS
    )


def states(run_id: str) -> dict[tuple[int, int], list[str]]:
    found: dict[tuple[int, int], list[str]] = {}
    for transfer in read_transfers(run_id):
        found.setdefault((transfer.rank, transfer.peer), []).append(transfer.state)
    return found


def test_a_request_and_its_answer(made: Ranks, run_id: str) -> None:
    one, two, three = made.ports.values()
    assert read_transfers(run_id) == []
    with ask(one) as exchange:
        assert states(run_id) == {(0, 1): ["waiting"], (0, 2): ["waiting"]}
        serve(two.poll())
        (batch,) = three.poll()
        batch.refuse(3)
        exchange.wait(SOON_S)
        first, second = read_transfers(run_id)
    names = {"epoch": 1, "step_idx": 7, "layer_idx": 3, "microbatch_idx": 1}
    assert first == Transfer(
        rank=0,
        peer=1,
        kind=TransferKind.REQUEST,
        state="answered",
        num_bytes=2 * 8 + 2 * 16,
        reply_bytes=2 * 16,
        sequence=1,
        **names,
    )
    assert (second.peer, second.state, second.num_bytes) == (2, "refused", 8 + 16)
    assert second.reply_bytes == 0


def test_what_is_given_up_and_what_comes_late(made: Ranks, run_id: str) -> None:
    one, two, _ = made.ports.values()
    ask(one).release()
    assert states(run_id) == {(0, 1): ["given up"], (0, 2): ["given up"]}
    assert two.poll() == []  # it is answered on the spot
    assert states(run_id)[0, 1] == ["given up"]
    again = ask(one, step_idx=8)
    late = two.poll()
    again.release()
    serve(late)
    assert states(run_id)[0, 1] == ["given up", "answered"]


def test_the_last_requests_of_each_pair_stay(made: Ranks, run_id: str) -> None:
    one, two, three = made.ports.values()
    for step_idx in range(5):
        with ask(one, step_idx=step_idx) as exchange:
            serve([*two.poll(), *three.poll()])
            exchange.wait(SOON_S)
    mine = [(t.sequence, t.step_idx) for t in read_transfers(run_id) if t.peer == 1]
    assert mine == [(4, 3), (5, 4)]
    assert len(mine) == SMALL.row_slots


def test_int8_rows_count_their_scales(made: Ranks, run_id: str) -> None:
    one, two, _ = made.ports.values()
    with one.exchange(ROWS, quantize=True) as exchange:
        exchange.add(1, tag=TAG)
        exchange.post(SOON_S)
        two.poll()[0].reply(ROWS, quantize=True)
        exchange.wait(SOON_S)
        (transfer,) = read_transfers(run_id)
    assert transfer.num_bytes == transfer.reply_bytes == 3 * (4 + 4)


def test_chunks_of_messages(made: Ranks, run_id: str) -> None:
    one, two, _ = made.ports.values()
    one.send(1, bytes(100), tag=6, timeout_s=SOON_S)
    one.send(1, bytes(5), tag=7, timeout_s=SOON_S)
    two.recv(0, np.zeros(100, np.uint8), SOON_S)
    found = read_transfers(run_id)
    assert {t.kind for t in found} == {TransferKind.CHUNK}
    assert [t.sequence for t in found] == list(range(1, len(found) + 1))
    assert sum(t.num_bytes for t in found if t.tag == 6) == 100
    assert {t.state for t in found if t.tag == 6} == {"taken"}
    last = found[-1]
    assert (last.tag, last.num_bytes, last.state) == (7, 5, "waiting")


def test_times_are_there_where_both_sides_trace(made: Ranks, run_id: str) -> None:
    one, two, three = made.ports.values()
    for port in (one, two):
        port.open_trace(8)
    with ask(one) as exchange:
        waiting = read_transfers(run_id)
        serve([*two.poll(), *three.poll()])
        exchange.wait(SOON_S)
        exchange.release()
        first, second = read_transfers(run_id)
    assert [t.duration_ns for t in waiting] == [None, None]
    records = {record.peer: record for record in one.trace_records()}
    assert first.start_ns == records[1].visible_ns
    assert first.duration_ns is not None
    assert 0 < first.duration_ns <= records[1].done_ns - records[1].visible_ns
    assert second.start_ns == records[2].visible_ns
    assert second.duration_ns is None  # rank 2 does not trace


def test_a_new_life_has_sent_nothing(made: Ranks, run_id: str) -> None:
    one, two, _ = made.ports.values()
    with ask(one):
        one.send(1, b"x", timeout_s=SOON_S)
        two.close()
        made.join(1)
        assert states(run_id) == {(0, 2): ["waiting"]}


def test_reading_changes_nothing(made: Ranks, run_id: str) -> None:
    with ask(made.ports[0]):
        before = [(info.path.read_bytes(), info.path.stat()) for info in list_segments(run_id)]
        assert read_transfers(run_id)
        for info, (content, stat) in zip(list_segments(run_id), before, strict=True):
            now = info.path.stat()
            assert info.path.read_bytes() == content
            assert (now.st_blocks, now.st_mtime_ns) == (stat.st_blocks, stat.st_mtime_ns)


def test_any_layout(run_id: str) -> None:
    """The offsets follow from the sizes of a run."""
    layout = Layout(
        max_ranks=13, p2p_slots=2, row_slots=64, request_bytes=320, reply_bytes=64, window_bytes=0
    )
    made = native_ranks(run_id, layout)
    one, two = made.join(11, 12)
    one.send(12, bytes(33), tag=3, timeout_s=SOON_S)
    with two.exchange(ROWS) as exchange:
        exchange.add(11, tag=TAG)
        exchange.post(SOON_S)
        one.poll()[0].refuse()
        chunk, request = read_transfers(run_id)[-2:]
    assert (chunk.rank, chunk.peer, chunk.tag) == (11, 12, 3)
    assert (request.rank, request.peer, request.state) == (12, 11, "refused")
    made.close()


def test_a_run_that_is_not_there() -> None:
    with pytest.raises(SegmentError, match="no rank of run 'nosuch'"):
        read_transfers("nosuch")
