"""A peer is killed at each step of each protocol: nobody blocks, and its next life starts clean."""

from __future__ import annotations

import itertools
import signal
import time

import numpy as np
import pytest

from tests.multiproc.xccl.processes import Process, Run
from tests.multiproc.xccl.workers import SIZES, STOP, WAIT_S, message
from xdeepserve.errors import PeerLost
from xdeepserve.xccl import Exchange, PeerState, Port, Tag, leftovers, list_segments

KILLED = -9
ROWS = np.arange(15, dtype=np.float32).reshape(3, 5)


def ask(port: Port, to: int, step_idx: int, *, kind: int = 0, timeout_s: float = WAIT_S) -> None:
    """One exchange, checked; PeerLost is left to the caller, after releasing."""
    with port.exchange(ROWS) as exchange:
        exchange.add(to, tag=Tag(1, step_idx, 0, 0), kind=kind)
        exchange.wait(timeout_s)
        (reply,) = exchange.replies()
        assert np.array_equal(reply.rows, ROWS * np.float32(2))


def join_again(port: Port, run: Run, work: str, *, rank: int = 1, **arguments: object) -> Process:
    """A new life of a rank, linked with `port`."""
    before = port.status_of(rank).incarnation
    process = run.start(work, rank=rank, **arguments)
    deadline = time.monotonic() + WAIT_S
    while port.status_of(rank).incarnation == before or not port.is_linked(rank):
        port.discover()
        assert time.monotonic() < deadline
    return process


@pytest.mark.parametrize("countdown", [1, 3])
@pytest.mark.parametrize("point", ["taken", "reply_copied", "reply_published", "about_to_sleep"])
def test_killed_server(run: Run, point: str, countdown: int) -> None:
    port = run.port(0)
    server = run.start("server", rank=1, fault=point, countdown=countdown)
    port.wait_linked([1], WAIT_S)
    with pytest.raises(PeerLost) as caught:
        ask_for_ever(port, pause_s=0.01 if point == "about_to_sleep" else 0.0)
    assert caught.value.ranks == (1,)
    assert server.end()[0] == KILLED
    assert [info.rank for info in leftovers() if info.run_id == run.run_id] == [1]
    again = join_again(port, run, "server")
    for step_idx in range(5):
        ask(port, 1, step_idx)
    ask(port, 1, 5, kind=STOP)
    assert again.result()["served"] == 5
    assert port.num_open_slots(1) == 0


def ask_for_ever(port: Port, *, pause_s: float) -> None:
    for step_idx in itertools.count():
        ask(port, 1, step_idx)
        time.sleep(pause_s)  # lets the server fall asleep


def test_killed_while_its_peer_only_asks(run: Run) -> None:
    port = run.port(0)
    server = run.start("idle", rank=1)
    port.wait_linked([1], WAIT_S)
    with port.exchange(ROWS) as exchange:
        exchange.add(1, tag=Tag(1, 0, 0, 0))
        assert not exchange.is_done()
        server.signal(signal.SIGKILL)
        with pytest.raises(PeerLost) as caught:
            ask_until_done(exchange)
    assert caught.value.ranks == (1,)


def ask_until_done(exchange: Exchange) -> None:
    deadline = time.monotonic() + WAIT_S
    while not exchange.is_done():
        assert time.monotonic() < deadline


@pytest.mark.parametrize("point", ["post_copied", "post_published", "reply_seen"])
def test_killed_asker(run: Run, point: str) -> None:
    """The server keeps serving a third rank, and the asker's next life."""
    port = run.port(0)
    dying = run.start("asker", rank=1, count=50, fault=point, countdown=4)
    steady = run.start("asker", rank=2, count=200, depth=3)
    port.wait_linked([1, 2], WAIT_S)
    serve_until_ended(port, dying)
    assert dying.end()[0] == KILLED
    assert port.status_of(1).state is PeerState.DEAD
    again = run.start("asker", rank=1, count=50)
    serve_until_ended(port, again, steady)
    assert again.result() == {"checked": 50}
    assert steady.result() == {"checked": 200}


def serve_until_ended(port: Port, *processes: Process) -> None:
    deadline = time.monotonic() + WAIT_S
    while any(process.is_running() for process in processes):
        port.discover()
        for batch in port.poll(0.05):
            batch.reply(np.ascontiguousarray(batch.rows) * np.float32(2))
        assert time.monotonic() < deadline


@pytest.mark.parametrize("countdown", [1, 5, 9])
@pytest.mark.parametrize("point", ["send_copied", "send_published"])
def test_killed_sender(run: Run, point: str, countdown: int) -> None:
    port = run.port(0)
    sender = run.start("sender", rank=1, count=60, fault=point, countdown=countdown)
    port.wait_linked([1], WAIT_S)
    with pytest.raises(PeerLost) as caught:
        receive_stream(port, 60)
    assert caught.value.ranks == (1,)
    assert sender.end()[0] == KILLED
    again = join_again(port, run, "sender", count=30)
    receive_stream(port, 30)
    assert again.result() == {"sent": 30}


def receive_stream(port: Port, count: int) -> None:
    out = np.zeros(max(SIZES), np.uint8)
    for index in range(count):
        size, tag = port.recv(1, out, timeout_s=WAIT_S)
        assert tag == index
        assert np.array_equal(out[:size], message(index))


@pytest.mark.parametrize("countdown", [1, 7])
@pytest.mark.parametrize("point", ["recv_copied", "recv_acked"])
def test_killed_receiver(run: Run, point: str, countdown: int) -> None:
    port = run.port(0)
    receiver = run.start("receiver", rank=1, count=60, fault=point, countdown=countdown)
    port.wait_linked([1], WAIT_S)
    with pytest.raises(PeerLost) as caught:
        send_stream(port, 60)
    assert caught.value.ranks == (1,)
    assert receiver.end()[0] == KILLED
    again = join_again(port, run, "receiver", count=30)
    send_stream(port, 30)
    assert again.result() == {"received": 30}


def send_stream(port: Port, count: int) -> None:
    for index in range(count):
        port.send(1, message(index), tag=index, timeout_s=WAIT_S)
    port.flush(1, WAIT_S)


def test_killed_between_put_and_signal(run: Run) -> None:
    port = run.port(0)
    putter = run.start("putter", rank=1, count=10, fault="put_copied", countdown=3)
    port.wait_linked([1], WAIT_S)
    with pytest.raises(PeerLost):
        acknowledge_puts(port, 10)
    assert putter.end()[0] == KILLED


def acknowledge_puts(port: Port, count: int) -> None:
    for index in range(1, count + 1):
        assert port.wait_signal(0, index, WAIT_S, [1]) == index
        assert (port.window[64 : 64 + 256] == index).all()
        port.signal(1, 0, index)


@pytest.mark.parametrize("point", ["created", "link_reset"])
def test_killed_while_joining(run: Run, point: str) -> None:
    port = run.port(0)
    joiner = run.start("server", rank=1, fault=point, arm_early=True)
    assert joiner.end()[0] == KILLED
    left = [info for info in list_segments(run.run_id) if info.name != "r0"]
    assert len(left) == 1
    again = join_again(port, run, "server")
    ask(port, 1, 0)
    ask(port, 1, 1, kind=STOP)
    assert again.result()["served"] == 1
