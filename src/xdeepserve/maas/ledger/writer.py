"""The one thread of a gateway that writes to the ledger, many requests in one transaction.

Reservations come first and their callers wait for them. Finished requests are settled after they
are over, as often as it takes: until their charge is committed they stay in the meter file, which
is the outbox. A gateway settles what dead gateways of this machine have left behind, too.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Final, TypeVar

from xdeepserve.clock import SYSTEM_CLOCK, Clock
from xdeepserve.errors import CapacityError, XDeepServeError
from xdeepserve.maas.ledger.ledger import reserve, settle
from xdeepserve.maas.ledger.meter import MeterFile, dead_files
from xdeepserve.maas.ledger.order import Order, QuotaError
from xdeepserve.maas.storage.database import Database, DatabaseError

logger = logging.getLogger(__name__)

T = TypeVar("T")

BATCH: Final = 256
MAX_WAITING: Final = 1024
RESERVE_TIMEOUT_S: Final = 5.0
TICK_S: Final = 1.0
"""Between looks at the clock when nobody asks for anything; counts reach the disk as often."""

RECOVER_S: Final = 30.0
"""Between looks for files of dead gateways."""

RETRY_S: Final = (0.1, 5.0)
"""After a failure; doubled each time up to the second."""


class LedgerWriter:
    """Writes reservations and charges.

    Args:
        database: with the latest schema.
        meters: of this gateway.
        folder: where gateways of this machine keep their meter files.
    """

    def __init__(
        self,
        database: Database,
        meters: MeterFile,
        folder: Path,
        *,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._database = database
        self._meters = meters
        self._folder = folder
        self._clock = clock
        self._orders: deque[tuple[Order, Future[None]]] = deque()
        self._finished: deque[int] = deque()
        self._has_work = threading.Event()
        self._has_work.set()  # to recover
        self._stop_s: float | None = None  # when it closes, at the latest
        self._retry_s = 0.0
        self._settle_from_s = 0.0
        self._flush_from_s = 0.0
        self._recover_from_s = 0.0
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    async def reserve(self, order: Order) -> None:
        """Returns when the reservation is committed.

        When this fails in any way the reservation may exist all the same: settle the request.

        Raises:
            QuotaError: the tenant's budget does not cover it.
            CapacityError: too many wait.
            DatabaseError: the database did not take it in time.
        """
        if len(self._orders) >= MAX_WAITING:
            raise CapacityError(f"{MAX_WAITING} requests wait for the ledger; try again later")
        done: Future[None] = Future()
        self._orders.append((order, done))
        self._has_work.set()
        try:
            await asyncio.wait_for(asyncio.wrap_future(done), RESERVE_TIMEOUT_S)
        except TimeoutError:
            raise DatabaseError(
                f"the ledger did not answer within {RESERVE_TIMEOUT_S:g} s"
            ) from None

    def settle(self, slot: int) -> None:
        """The request of a slot is over: charge it, and free the slot. Returns at once."""
        self._finished.append(slot)
        self._has_work.set()

    def close(self, timeout_s: float) -> None:
        """Settle what is over, for so long at most; what is left stays in the meter file."""
        self._stop_s = self._now_s() + timeout_s
        self._has_work.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over():
            self._has_work.wait(self._pause_s())
            self._has_work.clear()
            try:
                self._work()
            except Exception:  # loop top: whatever it was, the next round tries again
                logger.exception("the ledger's thread failed; it goes on")
                self._back_off()

    def _is_over(self) -> bool:
        if self._stop_s is None:
            return False
        return not (self._orders or self._finished) or self._now_s() >= self._stop_s

    def _work(self) -> None:
        # First what is over, then what is asked for: a reservation is older than its settlement.
        over = _take(self._finished) if self._now_s() >= self._settle_from_s else []
        self._reserve(_take(self._orders))
        self._settle(over)
        if self._now_s() >= self._flush_from_s:
            self._flush_from_s = self._now_s() + TICK_S
            self._meters.flush()
        if self._now_s() >= self._recover_from_s:
            self._recover_from_s = self._now_s() + RECOVER_S
            self.recover()

    def recover(self) -> None:
        """Settle what gateways that are dead have left behind.

        Raises:
            DatabaseError: not all of it; the rest is still there.
        """
        for meters in dead_files(self._folder):
            try:
                left = list(meters.left_over())
                for first in range(0, len(left), BATCH):
                    batch = left[first : first + BATCH]
                    with self._database.writing() as connection:
                        settle(connection, batch, self._now_us())
                    for metered in batch:
                        meters.free(metered.slot)
                logger.warning("settled %d requests of %s", len(left), meters.path.name)
            finally:
                meters.close()

    def _reserve(self, asked: Sequence[tuple[Order, Future[None]]]) -> None:
        wanted = [(o, done) for o, done in asked if done.set_running_or_notify_cancel()]
        if not wanted:
            return
        failed: XDeepServeError | None = DatabaseError("the ledger failed; try again")
        refused: dict[str, QuotaError] = {}
        try:
            with self._database.writing() as connection:
                refused = reserve(connection, [order for order, _ in wanted])
            failed = None
        except DatabaseError as exc:
            failed = exc
        finally:
            for order, done in wanted:
                _resolve(done, failed or refused.get(order.request_id))

    def _settle(self, slots: Sequence[int]) -> None:
        if not slots:
            return
        is_done = False
        try:
            with self._database.writing() as connection:
                settle(connection, map(self._meters.read, slots), self._now_us())
            is_done = True
        except DatabaseError as exc:
            self._back_off()
            logger.warning("%d requests wait to be billed: %s", len(slots), exc)
        finally:
            if not is_done:
                self._finished.extend(slots)
        if is_done:
            self._retry_s = 0.0
            for slot in slots:
                self._meters.free(slot)

    def _back_off(self) -> None:
        first_s, most_s = RETRY_S
        self._retry_s = min(most_s, max(first_s, 2 * self._retry_s))
        self._settle_from_s = self._now_s() + self._retry_s

    def _pause_s(self) -> float:
        if self._orders:
            return 0.0
        if not self._finished:
            return TICK_S
        return min(TICK_S, max(0.0, self._settle_from_s - self._now_s()))

    def _now_s(self) -> float:
        return self._clock.monotonic()

    def _now_us(self) -> int:
        return int(self._clock.wall() * 1e6)


def _resolve(done: Future[None], error: XDeepServeError | None) -> None:
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


def _take(queue: deque[T]) -> list[T]:
    """Up to BATCH entries from its front."""
    return [queue.popleft() for _ in range(min(BATCH, len(queue)))]
