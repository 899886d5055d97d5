"""Random schedules of reserve, settle, refuse, crash and retry: the books always balance."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.databases import KINDS, PostgresCluster, opened
from tests.unit.maas.ledger.orders import PRICE, assert_books_balance, new_key, order, over, rows
from xdeepserve.maas.ledger.budgets import Budgets
from xdeepserve.maas.ledger.ledger import reserve, settle
from xdeepserve.maas.ledger.meter import Ending
from xdeepserve.maas.ledger.order import QuotaError
from xdeepserve.maas.ledger.prices import TokenCounts
from xdeepserve.maas.storage.database import Database, DuplicateError
from xdeepserve.maas.storage.tables import CHARGES, RESERVATIONS

TENANTS = ("a", "b", "c")  # c has no budget

counts = st.builds(
    lambda prompt, cached, completion: TokenCounts(prompt, min(prompt, cached), completion),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(0, 10),
)
reserves = st.tuples(st.just("reserve"), st.integers(0, 9), st.sampled_from(TENANTS))
settles = st.tuples(
    st.just("settle"), st.integers(0, 9), counts, st.sampled_from([*Ending]), st.booleans()
)
schedules = st.lists(st.one_of(reserves, settles), max_size=25)
MOST = PRICE.most(20, 10)


class Crash(Exception):
    """The process ends before the commit."""


class Books:
    """A ledger, and what should be in it."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.keys = {name: new_key(database, name) for name in TENANTS}
        budgets = Budgets(database)
        budgets.add_credit("a", 3 * MOST)
        budgets.add_credit("b", 10 * MOST)
        self.reserved: set[str] = set()
        self.over: set[str] = set()
        self.charged: dict[str, int] = {}

    def reserve(self, number: int, tenant: str) -> None:
        request_id = f"{tenant}-{number}"
        try:
            with self.database.writing() as connection:
                wanted = [order(self.keys[tenant], request_id, most=MOST)]
                refused = reserve(connection, wanted)
            for error in refused.values():
                raise error
        except DuplicateError:
            assert request_id in self.reserved
        except QuotaError:
            assert tenant != "c"
        else:
            assert request_id not in self.reserved
            self.reserved.add(request_id)

    def settle(self, number: int, used: TokenCounts, ending: Ending, crashes: bool) -> None:
        done = [over(f"{tenant}-{number}", used, ending) for tenant in TENANTS]
        try:
            with self.database.writing() as connection:
                settle(connection, done, 1)
                if crashes:
                    raise Crash
        except Crash:
            return
        for each in done:
            if each.request_id in self.reserved:
                self.reserved.remove(each.request_id)
                self.over.add(each.request_id)
                if ending is not Ending.REFUSED:
                    assert each.request_id not in self.charged
                    self.charged[each.request_id] = PRICE.cost(used)

    def check(self) -> None:
        assert_books_balance(self.database)
        found = {row["request_id"]: row["charge_micro"] for row in rows(self.database, CHARGES)}
        assert found == self.charged
        held = {row["request_id"] for row in rows(self.database, RESERVATIONS)}
        assert held == self.reserved


def run(schedule: list[Any], url: str) -> None:
    with opened(url) as database:
        books = Books(database)
        for verb, *arguments in schedule:
            if verb == "reserve" and f"{arguments[1]}-{arguments[0]}" in books.over:
                continue  # request ids are never used again
            getattr(books, verb)(*arguments)
            books.check()


@pytest.mark.parametrize("kind", KINDS)
def test_conservation(kind: str, request: pytest.FixtureRequest) -> None:
    cluster: PostgresCluster | None = None
    if kind == "postgresql":
        cluster = request.getfixturevalue("cluster")

    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(schedules)
    def holds(schedule: list[Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            url = f"sqlite:///{Path(folder) / 'service.db'}"
            run(schedule, url if cluster is None else cluster.new_database())

    holds()
