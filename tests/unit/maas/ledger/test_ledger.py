"""reserve and settle: nothing is overspent, everything is charged once, the books balance."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tests.unit.maas.ledger.orders import (
    NOW_US,
    PRICE,
    assert_books_balance,
    new_key,
    order,
    over,
    rows,
)
from xdeepserve.errors import RequestError
from xdeepserve.maas.accounts.records import ApiKey
from xdeepserve.maas.ledger.budgets import Budgets
from xdeepserve.maas.ledger.ledger import reserve, settle
from xdeepserve.maas.ledger.meter import Ending, Metered
from xdeepserve.maas.ledger.order import Order, QuotaError, month_of
from xdeepserve.maas.ledger.prices import TokenCounts
from xdeepserve.maas.storage.database import Database, DuplicateError
from xdeepserve.maas.storage.tables import CHARGES, CREDITS, RESERVATIONS
from xdeepserve.testing.fake_clock import FakeClock

MONTH_S = 31 * 86_400


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(wall_s=NOW_US / 1e6)


@pytest.fixture
def key(database: Database) -> ApiKey:
    return new_key(database)


@pytest.fixture
def budgets(database: Database, clock: FakeClock) -> Budgets:
    return Budgets(database, clock)


def do_reserve(database: Database, wanted: Order) -> None:
    with database.writing() as connection:
        refused = reserve(connection, [wanted])
    for error in refused.values():
        raise error


def do_settle(database: Database, *done: Metered, now_us: int = NOW_US + 9) -> None:
    with database.writing() as connection:
        settle(connection, done, now_us)


def test_a_reservation_becomes_a_charge(database: Database, key: ApiKey, budgets: Budgets) -> None:
    budgets.add_credit("a", 1000)
    do_reserve(database, order(key, most=100))
    assert budgets.show("a").left_micro == 900  # type: ignore[union-attr]
    assert_books_balance(database)
    do_settle(database, over())
    (charge,) = rows(database, CHARGES)
    assert charge["charge_micro"] == 6 * 3 + 4 * 1 + 2 * 5
    assert charge["charge_micro"] == PRICE.cost(TokenCounts(10, 4, 2))
    assert (charge["prompt_tokens"], charge["cached_tokens"], charge["completion_tokens"]) == (
        10,
        4,
        2,
    )
    assert (charge["tenant_id"], charge["key_id"]) == (key.tenant_id, key.id)
    assert (charge["price_version"], charge["output_price"]) == ("v1", 5_000_000)
    assert (charge["finish_reason"], charge["finished_us"]) == ("stop", NOW_US + 5)
    assert rows(database, RESERVATIONS) == []
    assert budgets.show("a").left_micro == 1000 - 32  # type: ignore[union-attr]
    assert_books_balance(database)


def test_settling_twice_charges_once(database: Database, key: ApiKey, budgets: Budgets) -> None:
    budgets.add_credit("a", 1000)
    do_reserve(database, order(key))
    do_settle(database, over())
    before = rows(database, CHARGES)
    do_settle(database, over(counts=TokenCounts(99, 0, 99)))
    do_settle(database, over("never reserved"))
    assert rows(database, CHARGES) == before
    assert_books_balance(database)


def test_a_request_id_is_reserved_once(database: Database, key: ApiKey, budgets: Budgets) -> None:
    budgets.add_credit("a", 1000)
    do_reserve(database, order(key))
    with pytest.raises(DuplicateError):
        do_reserve(database, order(key))
    assert_books_balance(database)


def test_a_refused_request_is_free(database: Database, key: ApiKey, budgets: Budgets) -> None:
    budgets.add_credit("a", 100)
    do_reserve(database, order(key))
    do_settle(database, over(counts=TokenCounts(), ending=Ending.REFUSED))
    assert rows(database, CHARGES) == rows(database, RESERVATIONS) == []
    assert budgets.show("a").left_micro == 100  # type: ignore[union-attr]


def test_money_that_is_not_there(database: Database, key: ApiKey, budgets: Budgets) -> None:
    budgets.add_credit("a", 150)
    do_reserve(database, order(key, "r1"))
    with pytest.raises(QuotaError, match="100 micro-units and the balance has 50") as caught:
        do_reserve(database, order(key, "r2"))
    assert (caught.value.status, caught.value.code) == (402, "insufficient_quota")
    do_reserve(database, order(key, "r3", most=50))
    assert len(rows(database, RESERVATIONS)) == 2
    assert_books_balance(database)


def test_a_budget_of_a_month(
    database: Database, key: ApiKey, budgets: Budgets, clock: FakeClock
) -> None:
    budgets.set_monthly("a", 100)
    do_reserve(database, order(key, "r1", most=80))
    with pytest.raises(QuotaError, match="budget of this month has 20") as caught:
        do_reserve(database, order(key, "r2", most=80))
    assert caught.value.status == 429
    do_settle(database, over("r1"))
    assert budgets.show("a").spent_micro == 32  # type: ignore[union-attr]
    clock.advance(MONTH_S)
    later_us = NOW_US + MONTH_S * 10**6
    assert month_of(later_us) > month_of(NOW_US)
    do_reserve(database, order(key, "r3", most=100, accepted_us=later_us))
    with pytest.raises(QuotaError):
        do_reserve(database, order(key, "r4", most=1, accepted_us=later_us))
    do_settle(database, over("r3"), now_us=later_us)
    found = budgets.show("a")
    assert found is not None
    assert (found.spent_micro, found.left_micro, found.month) == (32, 68, month_of(later_us))


def test_what_runs_over_the_end_of_a_month_counts_in_the_next(
    database: Database, key: ApiKey, budgets: Budgets, clock: FakeClock
) -> None:
    budgets.set_monthly("a", 100)
    do_reserve(database, order(key, most=80))
    clock.advance(MONTH_S)
    do_settle(database, over(), now_us=NOW_US + MONTH_S * 10**6)
    found = budgets.show("a")
    assert found is not None
    assert (found.spent_micro, found.reserved_micro) == (32, 0)


def test_a_budget_that_comes_late_holds_what_runs(
    database: Database, key: ApiKey, budgets: Budgets
) -> None:
    do_reserve(database, order(key, most=70))
    assert budgets.show("a") is None
    budgets.add_credit("a", 100)
    with pytest.raises(QuotaError):
        do_reserve(database, order(key, "r2", most=40))
    do_settle(database, over())
    assert_books_balance(database)


@pytest.mark.parametrize(
    "change",
    [
        lambda budgets: budgets.set_monthly("a", 5),
        lambda budgets: budgets.add_credit("a", -101),
        lambda budgets: budgets.add_credit("a", 0),
        lambda budgets: budgets.add_credit("a", 10**16),
        lambda budgets: budgets.add_credit("a", 1, "x" * 201),
    ],
)
def test_changes_that_make_no_sense(
    database: Database, key: ApiKey, budgets: Budgets, change: Callable[[Budgets], object]
) -> None:
    budgets.add_credit("a", 100)
    with pytest.raises(RequestError):
        change(budgets)
    assert [row["micro"] for row in rows(database, CREDITS)] == [100]
    assert_books_balance(database)


def test_credit_can_be_taken_back(database: Database, key: ApiKey, budgets: Budgets) -> None:
    budgets.add_credit("a", 100, "paid")
    do_reserve(database, order(key, most=60))
    with pytest.raises(RequestError):
        budgets.add_credit("a", -41)
    assert budgets.add_credit("a", -40).left_micro == 0
    assert_books_balance(database)


def test_many_at_once_do_not_overspend(database: Database, key: ApiKey, budgets: Budgets) -> None:
    budgets.add_credit("a", 1000)
    outcomes: list[str] = []

    def buy(first: int) -> None:
        for i in range(10):
            try:
                do_reserve(database, order(key, f"r{first}-{i}", most=70))
                outcomes.append("reserved")
                do_settle(database, over(f"r{first}-{i}", TokenCounts(20, 0, 2)))
            except QuotaError:
                outcomes.append("refused")

    threads = [threading.Thread(target=buy, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 40
    assert outcomes.count("reserved") == len(rows(database, CHARGES))
    assert outcomes.count("refused") > 0
    assert_books_balance(database)
    assert budgets.show("a").left_micro < 70  # type: ignore[union-attr]


def test_of_many_at_once_those_run_that_are_covered(
    database: Database, key: ApiKey, budgets: Budgets
) -> None:
    other = new_key(database, "b")
    budgets.add_credit("a", 100)
    wanted = [
        order(key, "r1", most=60),
        order(other, "s1", most=10**9),
        order(key, "r2", most=60),
        order(key, "r3", most=40),
    ]
    with database.writing() as connection:
        refused = reserve(connection, wanted)
    assert set(refused) == {"r2"}
    assert "the balance has 40 left" in refused["r2"].message
    assert {row["request_id"] for row in rows(database, RESERVATIONS)} == {"r1", "r3", "s1"}
    assert_books_balance(database)
    endings = {"r1": Ending.STOP, "r2": Ending.STOP, "r3": Ending.REFUSED, "s1": Ending.ABORT}
    do_settle(database, *(over(name, ending=ending) for name, ending in endings.items()))
    found = {row["request_id"]: row["finish_reason"] for row in rows(database, CHARGES)}
    assert found == {"r1": "stop", "s1": "abort"}
    assert rows(database, RESERVATIONS) == []
    assert_books_balance(database)
