"""The ledger's transactions: reserve before a request runs, settle after it, each exactly once.

A reservation holds the most that a request can cost, in one statement that fails where the budget
does not have it, so concurrent requests cannot overspend. Settling turns the reservation into a
charge in one transaction: whoever comes second finds none. At any time, for every budget:

    spent = sum of charges     reserved = sum of reservations     spent + reserved <= amount

A budget of a month counts what is settled in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from xdeepserve.maas.ledger.meter import Ending, Metered
from xdeepserve.maas.ledger.order import MONTHLY, Order, QuotaError, month_of
from xdeepserve.maas.ledger.prices import Price
from xdeepserve.maas.storage.tables import BUDGETS, CHARGES, RESERVATIONS


def reserve(connection: Connection, order: Order) -> None:
    """Hold what the request may cost.

    Raises:
        QuotaError: the budget does not have it.
        DuplicateError: the request id is taken.
    """
    start_month(connection, order.tenant_id, month_of(order.accepted_us))
    left = BUDGETS.c.amount_micro - BUDGETS.c.spent_micro - BUDGETS.c.reserved_micro
    hold = (
        update(BUDGETS)
        .where(BUDGETS.c.tenant_id == order.tenant_id, left >= order.most_micro)
        .values(reserved_micro=BUDGETS.c.reserved_micro + order.most_micro)
    )
    if connection.execute(hold).rowcount == 0:
        wanted = select(BUDGETS.c.kind, left).where(BUDGETS.c.tenant_id == order.tenant_id)
        row = connection.execute(wanted).first()
        if row is not None:
            raise QuotaError(row[0], order.most_micro, row[1])
    connection.execute(insert(RESERVATIONS).values(_order_row(order)))


def start_month(connection: Connection, tenant_id: str, month: str) -> None:
    """In a new month nothing is spent of a monthly budget yet."""
    connection.execute(
        update(BUDGETS)
        .where(BUDGETS.c.tenant_id == tenant_id, BUDGETS.c.kind == MONTHLY, BUDGETS.c.month < month)
        .values(spent_micro=0, month=month)
    )


def settle(connection: Connection, done: Iterable[Metered], now_us: int) -> None:
    """Charge requests that are over; those without a reservation are charged already.

    Budgets are locked in the order of tenants, so that settling on two gateways cannot deadlock.
    """
    by_id = {metered.request_id: metered for metered in done}
    wanted = select(RESERVATIONS).where(RESERVATIONS.c.request_id.in_(by_id))
    locked = wanted.order_by(RESERVATIONS.c.tenant_id, RESERVATIONS.c.request_id).with_for_update()
    for row in connection.execute(locked).mappings().all():
        _settle_one(connection, row, by_id[row["request_id"]], now_us)


def _settle_one(connection: Connection, row: Any, metered: Metered, now_us: int) -> None:
    is_refused = metered.ending is Ending.REFUSED
    price = Price(
        input=row["input_price"], output=row["output_price"], cached_input=row["cached_price"]
    )
    charge = 0 if is_refused else price.cost(metered.counts)
    if not is_refused:
        order = {name: value for name, value in row.items() if name != "reserved_micro"}
        connection.execute(insert(CHARGES).values(**order, **_usage_row(metered, charge, now_us)))
    connection.execute(delete(RESERVATIONS).where(RESERVATIONS.c.request_id == metered.request_id))
    start_month(connection, row["tenant_id"], month_of(now_us))
    connection.execute(
        update(BUDGETS)
        .where(BUDGETS.c.tenant_id == row["tenant_id"])
        .values(
            reserved_micro=BUDGETS.c.reserved_micro - row["reserved_micro"],
            spent_micro=BUDGETS.c.spent_micro + charge,
        )
    )


def _order_row(order: Order) -> dict[str, Any]:
    row = {name: getattr(order, name) for name in order.__struct_fields__}
    price: Price = row.pop("price")
    row["reserved_micro"] = row.pop("most_micro")
    cached = price.input if price.cached_input is None else price.cached_input
    return row | {
        "input_price": price.input,
        "cached_price": cached,
        "output_price": price.output,
    }


def _usage_row(metered: Metered, charge: int, now_us: int) -> dict[str, Any]:
    return {
        "prompt_tokens": metered.counts.prompt,
        "cached_tokens": metered.counts.cached,
        "completion_tokens": metered.counts.completion,
        "charge_micro": charge,
        "finish_reason": metered.ending.name.lower(),
        "finished_us": metered.finished_us or now_us,
        "settled_us": now_us,
    }
