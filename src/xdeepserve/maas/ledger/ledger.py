"""The ledger's transactions: reserve before a request runs, settle after it, each exactly once.

A reservation holds the most that a request can cost, while the row of its budget is locked, so
concurrent requests cannot overspend. Settling turns the reservation into a charge in one
transaction: whoever comes second finds none. At any time, for every budget:

    spent = sum of charges     reserved = sum of reservations     spent + reserved <= amount

A budget of a month counts what is settled in it. Both take many requests at once, with a few
statements for each tenant, and lock budgets in the order of tenants, so that gateways that do the
same cannot deadlock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from xdeepserve.maas.ledger.meter import Ending, Metered
from xdeepserve.maas.ledger.order import MONTHLY, Order, QuotaError, month_of
from xdeepserve.maas.ledger.prices import Price
from xdeepserve.maas.storage.tables import BUDGETS, CHARGES, RESERVATIONS


def reserve(connection: Connection, orders: Iterable[Order]) -> dict[str, QuotaError]:
    """Hold what the requests may cost, in the order given among those of a tenant.

    Returns:
        Request id -> why its tenant cannot have it; nothing is held for those.

    Raises:
        DuplicateError: a request id is taken.
    """
    by_tenant = attrgetter("tenant_id")
    accepted: list[Order] = []
    refused: dict[str, QuotaError] = {}
    for tenant_id, group in groupby(sorted(orders, key=by_tenant), key=by_tenant):
        for order, error in _hold(connection, tenant_id, list(group)):
            if error is None:
                accepted.append(order)
            else:
                refused[order.request_id] = error
    if accepted:
        connection.execute(insert(RESERVATIONS), [_order_row(order) for order in accepted])
    return refused


def _hold(
    connection: Connection, tenant_id: str, orders: Sequence[Order]
) -> list[tuple[Order, QuotaError | None]]:
    """What the tenant's budget says to each of some orders; it holds those that it has."""
    start_month(connection, tenant_id, month_of(max(order.accepted_us for order in orders)))
    left = BUDGETS.c.amount_micro - BUDGETS.c.spent_micro - BUDGETS.c.reserved_micro
    wanted = select(BUDGETS.c.kind, left).where(BUDGETS.c.tenant_id == tenant_id)
    row = connection.execute(wanted.with_for_update()).first()
    if row is None:
        return [(order, None) for order in orders]
    kind, left_micro = row
    answers: list[tuple[Order, QuotaError | None]] = []
    held = 0
    for order in orders:
        is_covered = held + order.most_micro <= left_micro
        held += order.most_micro if is_covered else 0
        error = None if is_covered else QuotaError(kind, order.most_micro, left_micro - held)
        answers.append((order, error))
    _move(connection, tenant_id, reserved=held, spent=0)
    return answers


def start_month(connection: Connection, tenant_id: str, month: str) -> None:
    """In a new month nothing is spent of a monthly budget yet."""
    connection.execute(
        update(BUDGETS)
        .where(BUDGETS.c.tenant_id == tenant_id, BUDGETS.c.kind == MONTHLY, BUDGETS.c.month < month)
        .values(spent_micro=0, month=month)
    )


def settle(connection: Connection, done: Iterable[Metered], now_us: int) -> None:
    """Charge requests that are over; those without a reservation are charged already."""
    by_id = {metered.request_id: metered for metered in done}
    wanted = select(RESERVATIONS).where(RESERVATIONS.c.request_id.in_(by_id))
    locked = wanted.order_by(RESERVATIONS.c.tenant_id, RESERVATIONS.c.request_id).with_for_update()
    reservations = connection.execute(locked).mappings().all()
    if not reservations:
        return
    charges = [
        charge
        for row in reservations
        if (charge := _charge_row(row, by_id[row["request_id"]], now_us)) is not None
    ]
    if charges:
        connection.execute(insert(CHARGES), charges)
    ids = [row["request_id"] for row in reservations]
    connection.execute(delete(RESERVATIONS).where(RESERVATIONS.c.request_id.in_(ids)))
    spent = {charge["request_id"]: charge["charge_micro"] for charge in charges}
    for tenant_id, group in groupby(reservations, key=itemgetter("tenant_id")):
        rows = list(group)
        start_month(connection, tenant_id, month_of(now_us))
        _move(
            connection,
            tenant_id,
            reserved=-sum(row["reserved_micro"] for row in rows),
            spent=sum(spent.get(row["request_id"], 0) for row in rows),
        )


def _move(connection: Connection, tenant_id: str, *, reserved: int, spent: int) -> None:
    """Add to what a budget, if there is one, has reserved and spent."""
    connection.execute(
        update(BUDGETS)
        .where(BUDGETS.c.tenant_id == tenant_id)
        .values(
            reserved_micro=BUDGETS.c.reserved_micro + reserved,
            spent_micro=BUDGETS.c.spent_micro + spent,
        )
    )


def _charge_row(reservation: Any, metered: Metered, now_us: int) -> dict[str, Any] | None:
    """The charge of a reservation; None for a request that was refused."""
    if metered.ending is Ending.REFUSED:
        return None
    price = Price(
        input=reservation["input_price"],
        output=reservation["output_price"],
        cached_input=reservation["cached_price"],
    )
    order = {name: value for name, value in reservation.items() if name != "reserved_micro"}
    return order | {
        "prompt_tokens": metered.counts.prompt,
        "cached_tokens": metered.counts.cached,
        "completion_tokens": metered.counts.completion,
        "charge_micro": price.cost(metered.counts),
        "finish_reason": metered.ending.name.lower(),
        "finished_us": metered.finished_us or now_us,
        "settled_us": now_us,
    }


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
