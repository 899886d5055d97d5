"""Somebody who takes no part reads the transfers of two busy processes: never half of one."""

from __future__ import annotations

from tests.multiproc.xccl.processes import Run
from xdeepserve.errors import SegmentError
from xdeepserve.xccl import Transfer, TransferKind, read_transfers

COUNT = 2_000
NUM_BYTES = 3 * 5 * 4  # of a request, and of its answer


def test_an_observer_of_a_busy_run(run: Run) -> None:
    run.start("server", rank=1, peers=[2], trace=True)
    asker = run.start("asker", rank=2, peers=[1], to=1, count=COUNT, depth=3, trace=True)
    seen: set[int] = set()
    while asker.is_running():
        try:
            transfers = read_transfers(run.run_id)
        except SegmentError:  # nobody has begun yet
            continue
        for transfer in transfers:
            check(transfer)
            seen.add(transfer.sequence)
    assert asker.result() == {"checked": COUNT}
    assert len(seen) > 1


def check(transfer: Transfer) -> None:
    """A request of the asker is as the asker made it."""
    assert (transfer.rank, transfer.peer) == (2, 1)
    assert transfer.kind is TransferKind.REQUEST
    assert (transfer.epoch, transfer.step_idx) == (1, transfer.sequence - 1)
    assert transfer.num_bytes == NUM_BYTES
    assert transfer.start_ns is not None
    if transfer.state == "waiting":
        assert (transfer.reply_bytes, transfer.duration_ns) == (0, None)
    else:
        assert transfer.state == "answered"
        assert transfer.reply_bytes == NUM_BYTES
        assert transfer.duration_ns is not None
        assert transfer.duration_ns > 0
