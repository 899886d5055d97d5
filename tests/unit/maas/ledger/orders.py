"""Orders and tenants for tests of the ledger."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select

from xdeepserve.maas.accounts.accounts import Accounts
from xdeepserve.maas.accounts.records import ApiKey
from xdeepserve.maas.ledger.meter import Ending, Metered
from xdeepserve.maas.ledger.order import Order
from xdeepserve.maas.ledger.prices import Price, TokenCounts
from xdeepserve.maas.storage.database import Database
from xdeepserve.maas.storage.tables import BUDGETS, CHARGES, CREDITS, RESERVATIONS

PRICE = Price(input=3_000_000, output=5_000_000, cached_input=1_000_000)
"""3, 5 and 1 micro-units a token."""

NOW_US = 1_790_000_000_000_000
"""In September 2026."""


def new_key(database: Database, tenant: str = "a") -> ApiKey:
    """A key of a new tenant."""
    accounts = Accounts(database)
    accounts.create_tenant(tenant)
    return accounts.create_key(tenant, "k").key


def order(key: ApiKey, request_id: str = "r", *, most: int = 100, **changes: Any) -> Order:
    """A request that may cost `most`."""
    fields: dict[str, Any] = {
        "request_id": request_id,
        "tenant_id": key.tenant_id,
        "project_id": key.project_id,
        "key_id": key.id,
        "model": "m",
        "tier_asked": "default",
        "tier_served": "default",
        "price": PRICE,
        "price_version": "v1",
        "most_micro": most,
        "accepted_us": NOW_US,
    }
    return Order(**fields | changes)


def over(
    request_id: str = "r", counts: TokenCounts | None = None, ending: Ending = Ending.STOP
) -> Metered:
    """A request that is over."""
    counts = TokenCounts(prompt=10, cached=4, completion=2) if counts is None else counts
    return Metered(
        slot=0, request_id=request_id, counts=counts, ending=ending, finished_us=NOW_US + 5
    )


def rows(database: Database, table: Any) -> list[dict[str, Any]]:
    """All of a table."""
    with database.reading() as connection:
        return [dict(row) for row in connection.execute(select(table)).mappings()]


def assert_books_balance(database: Database) -> None:
    """What every budget says is what its reservations, charges and credits say."""
    with database.reading() as connection:

        def total(column: Any, tenant: str) -> int:
            wanted = select(func.coalesce(func.sum(column), 0))
            return int(
                connection.execute(wanted.where(column.table.c.tenant_id == tenant)).scalar_one()
            )

        for budget in connection.execute(select(BUDGETS)).mappings():
            tenant = budget["tenant_id"]
            assert budget["reserved_micro"] == total(RESERVATIONS.c.reserved_micro, tenant)
            assert budget["spent_micro"] == total(CHARGES.c.charge_micro, tenant)
            if budget["kind"] == "prepaid":
                assert budget["amount_micro"] == total(CREDITS.c.micro, tenant)
                assert budget["spent_micro"] + budget["reserved_micro"] <= budget["amount_micro"]
