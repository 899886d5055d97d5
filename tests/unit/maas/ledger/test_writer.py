"""LedgerWriter: callers get their answer, what is over is settled however often it takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.databases import opened
from tests.unit.maas.ledger.orders import assert_books_balance, new_key, order, rows
from xdeepserve.maas.accounts.records import ApiKey
from xdeepserve.maas.ledger import writer as module
from xdeepserve.maas.ledger.budgets import Budgets
from xdeepserve.maas.ledger.meter import Ending, MeterFile
from xdeepserve.maas.ledger.order import QuotaError
from xdeepserve.maas.ledger.prices import TokenCounts
from xdeepserve.maas.ledger.writer import LedgerWriter
from xdeepserve.maas.storage.database import Database, DatabaseError
from xdeepserve.maas.storage.tables import CHARGES, RESERVATIONS

TIMEOUT_S = 20.0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.005)


class Gateway:
    """A writer with its meters, on one database."""

    def __init__(self, database: Database, folder: Path, name: str = "a") -> None:
        self.database = database
        self.meters = MeterFile(folder / f"{name}.meter", num_slots=512)
        self.writer = LedgerWriter(database, self.meters, folder)

    async def serve(self, wanted: Any, counts: TokenCounts | None = None) -> None:
        """One request from its reservation to its end."""
        meter = self.meters.claim(wanted.request_id)
        try:
            await self.writer.reserve(wanted)
        except BaseException:
            meter.finish(Ending.REFUSED, 1)
            raise
        else:
            meter.record(counts or TokenCounts(10, 0, 2))
            meter.finish(Ending.STOP, 1)
        finally:
            self.writer.settle(meter.slot)

    def close(self) -> None:
        self.writer.close(TIMEOUT_S)
        self.meters.close()


@pytest.fixture
def key(database: Database) -> ApiKey:
    return new_key(database)


@pytest.fixture
def gateway(database: Database, key: ApiKey, tmp_path: Path) -> Iterator[Gateway]:
    Budgets(database).add_credit("a", 10_000)
    found = Gateway(database, tmp_path / "meters")
    yield found
    found.close()


class Faults:
    """Makes the database fail on purpose."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_left = 0
        self.is_after_commit = False
        self._writing = database.writing
        monkeypatch.setattr(database, "writing", self._fail)

    @contextmanager
    def _fail(self) -> Iterator[Any]:
        fails = self.num_left > 0
        self.num_left -= fails
        if fails and not self.is_after_commit:
            raise DatabaseError("down")
        with self._writing() as connection:
            yield connection
        if fails:
            raise DatabaseError("the connection broke after the commit")


@pytest.fixture
def faults(database: Database, monkeypatch: pytest.MonkeyPatch) -> Faults:
    monkeypatch.setattr(module, "RETRY_S", (0.01, 0.02))
    return Faults(database, monkeypatch)


async def test_many_at_once(gateway: Gateway, key: ApiKey, database: Database) -> None:
    outcomes = await asyncio.gather(
        *(gateway.serve(order(key, f"r{i}", most=100)) for i in range(300)), return_exceptions=True
    )
    refused = [outcome for outcome in outcomes if outcome is not None]
    assert all(isinstance(outcome, QuotaError) for outcome in refused)
    assert len(refused) > 0
    await until(lambda: gateway.meters.num_open == 0)
    assert len(rows(database, CHARGES)) == 300 - len(refused)
    assert rows(database, RESERVATIONS) == []
    assert_books_balance(database)


async def test_a_reservation_fails_when_the_database_does(
    gateway: Gateway, key: ApiKey, database: Database, faults: Faults
) -> None:
    faults.num_left = 1
    with pytest.raises(DatabaseError, match="down"):
        await gateway.serve(order(key))
    await until(lambda: gateway.meters.num_open == 0)
    assert rows(database, CHARGES) == rows(database, RESERVATIONS) == []


async def test_a_reservation_that_nobody_heard_of_is_let_go(
    gateway: Gateway, key: ApiKey, database: Database, faults: Faults
) -> None:
    faults.num_left, faults.is_after_commit = 1, True
    with pytest.raises(DatabaseError, match="broke"):
        await gateway.serve(order(key))
    await until(lambda: gateway.meters.num_open == 0)
    assert rows(database, CHARGES) == rows(database, RESERVATIONS) == []
    assert_books_balance(database)


@pytest.mark.parametrize("is_after_commit", [False, True])
async def test_settling_goes_on_until_it_is_done(
    gateway: Gateway, key: ApiKey, database: Database, faults: Faults, is_after_commit: bool
) -> None:
    meter = gateway.meters.claim("r")
    await gateway.writer.reserve(order(key))
    meter.record(TokenCounts(10, 0, 2))
    meter.finish(Ending.STOP, 1)
    faults.num_left, faults.is_after_commit = 4, is_after_commit
    gateway.writer.settle(meter.slot)
    await until(lambda: gateway.meters.num_open == 0)
    assert [row["charge_micro"] for row in rows(database, CHARGES)] == [40]
    assert_books_balance(database)


async def test_a_bug_does_not_end_the_thread(
    gateway: Gateway, key: ApiKey, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", (0.01, 0.02))
    true, calls = module.settle, []

    def settle(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) < 3:
            raise ZeroDivisionError
        true(*arguments)

    monkeypatch.setattr(module, "settle", settle)
    await gateway.serve(order(key))
    await until(lambda: gateway.meters.num_open == 0)
    assert len(rows(database, CHARGES)) == 1
    assert len(calls) == 3


async def test_a_database_that_does_not_answer_is_not_waited_for(
    gateway: Gateway, key: ApiKey, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RESERVE_TIMEOUT_S", 0.05)
    true = module.reserve

    def slow(*arguments: Any) -> None:
        time.sleep(0.2)
        true(*arguments)

    monkeypatch.setattr(module, "reserve", slow)
    with pytest.raises(DatabaseError, match="did not answer"):
        await gateway.serve(order(key))
    await until(lambda: gateway.meters.num_open == 0)
    assert rows(database, CHARGES) == rows(database, RESERVATIONS) == []
    assert_books_balance(database)


async def test_a_client_that_leaves_while_it_waits(
    gateway: Gateway, key: ApiKey, database: Database
) -> None:
    tasks = [asyncio.create_task(gateway.serve(order(key, f"r{i}"))) for i in range(20)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(lambda: gateway.meters.num_open == 0)
    charged = {row["request_id"] for row in rows(database, CHARGES)}
    assert charged >= {f"r{i}" for i in range(1, 20, 2)}
    assert rows(database, RESERVATIONS) == []
    assert_books_balance(database)


async def test_what_a_dead_gateway_left_is_settled_by_the_next(
    database_url: str, tmp_path: Path
) -> None:
    folder = tmp_path / "meters"
    with opened(database_url) as database:
        key = new_key(database)
        Budgets(database).add_credit("a", 10_000)
        first = Gateway(database, folder, "first")
        running = first.meters.claim("running")
        await first.writer.reserve(order(key, "running"))
        running.record(TokenCounts(10, 0, 1))
        first.meters.claim("never reserved")
        waiting = first.meters.claim("waiting")
        await first.writer.reserve(order(key, "waiting"))
        first.close()
        del waiting
        second = Gateway(database, folder, "second")
        await until(lambda: not (folder / "first.meter").exists())
        second.close()
        found = {row["request_id"]: row for row in rows(database, CHARGES)}
        assert {name: row["charge_micro"] for name, row in found.items()} == {
            "running": 35,
            "waiting": 0,
        }
        assert {row["finish_reason"] for row in found.values()} == {"crash"}
        assert_books_balance(database)
        assert list(folder.iterdir()) == []


async def test_what_cannot_be_settled_stays_in_the_file(
    database: Database, key: ApiKey, tmp_path: Path, faults: Faults
) -> None:
    gateway = Gateway(database, tmp_path / "meters")
    meter = gateway.meters.claim("r")
    await gateway.writer.reserve(order(key))
    meter.record(TokenCounts(10, 0, 2))
    meter.finish(Ending.STOP, 1)
    faults.num_left = 10**9
    gateway.writer.settle(meter.slot)
    gateway.writer.close(0.1)
    gateway.meters.close()
    faults.num_left = 0
    again = Gateway(database, tmp_path / "meters", "b")
    await until(lambda: rows(database, CHARGES) != [])
    again.close()
    assert [row["completion_tokens"] for row in rows(database, CHARGES)] == [2]
