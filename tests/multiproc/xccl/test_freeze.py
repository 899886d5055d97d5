"""A peer is stopped and goes on: lost in bounded time, then welcome again; late answers drop."""

from __future__ import annotations

import signal
import time

import numpy as np
import pytest

from tests.multiproc.xccl.processes import Run
from tests.multiproc.xccl.test_kill import ROWS, ask
from tests.multiproc.xccl.workers import STOP, WAIT_S
from xdeepserve.errors import PeerLost
from xdeepserve.xccl import PartState, PeerState, Tag

FROZEN_AFTER_S = 0.2


def test_a_frozen_server_is_lost_its_rows_go_elsewhere_and_its_late_answer_is_dropped(
    run: Run,
) -> None:
    port = run.port(0, frozen_after_s=FROZEN_AFTER_S)
    frozen, replica = run.start("server", rank=1), run.start("server", rank=2)
    port.wait_linked([1, 2], WAIT_S)
    ask(port, 1, 0)
    frozen.signal(signal.SIGSTOP)
    exchange = port.exchange(ROWS)
    exchange.add(1, tag=Tag(1, 1, 0, 0))
    started = time.monotonic()
    with pytest.raises(PeerLost) as caught:
        exchange.wait(WAIT_S)
    assert time.monotonic() - started < FROZEN_AFTER_S * 20
    assert caught.value.ranks == (1,)
    assert port.status_of(1).state is PeerState.FROZEN
    assert exchange.resend(1, 2, Tag(2, 1, 0, 0))
    exchange.wait(WAIT_S)
    assert [part.state for part in exchange.parts] == [PartState.MOVED, PartState.ANSWERED]
    exchange.release()
    frozen.signal(signal.SIGCONT)
    for step_idx in range(2, 12):  # more than there are slots: the late one is reclaimed
        ask(port, 1, step_idx)
    assert port.num_late == 1
    assert port.status_of(1).state is PeerState.ALIVE
    for rank in (1, 2):
        ask(port, rank, 99, kind=STOP)
    assert frozen.result() == {"served": 11, "cancelled": 1}
    assert replica.result()["served"] == 1


def test_a_frozen_asker_holds_up_nobody(run: Run) -> None:
    port = run.port(0)
    stopped = run.start("asker", rank=1, count=10_000, depth=3)
    steady = run.start("asker", rank=2, count=300)
    port.wait_linked([1, 2], WAIT_S)
    for batch in port.poll(WAIT_S):
        batch.reply(np.ascontiguousarray(batch.rows) * np.float32(2))
    stopped.signal(signal.SIGSTOP)
    while steady.is_running():
        for batch in port.poll(0.05):
            batch.reply(np.ascontiguousarray(batch.rows) * np.float32(2))
    assert steady.result() == {"checked": 300}


def test_a_replaced_life_that_thaws_reaches_nobody(run: Run) -> None:
    """The old process goes on after a new one took its rank: it serves nobody any more."""
    port = run.port(0, frozen_after_s=FROZEN_AFTER_S)
    old = run.start("server", rank=1)
    port.wait_linked([1], WAIT_S)
    ask(port, 1, 0)
    old.signal(signal.SIGSTOP)
    with port.exchange(ROWS) as exchange:
        exchange.add(1, tag=Tag(1, 1, 0, 0))
        with pytest.raises(PeerLost):
            exchange.wait(WAIT_S)
    before = port.status_of(1).incarnation
    new = run.start("server", rank=1)
    while port.status_of(1).incarnation == before or not port.is_linked(1):
        port.discover()
    old.signal(signal.SIGCONT)
    for step_idx in range(2, 300):
        ask(port, 1, step_idx)
    ask(port, 1, 300, kind=STOP)
    assert new.result()["served"] == 298
    assert port.num_late == 0
