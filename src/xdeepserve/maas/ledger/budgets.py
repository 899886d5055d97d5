"""What tenants may spend: prepaid balances and monthly budgets. Blocking, as `Accounts`."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from sqlalchemy import Connection, func, insert, select, text, update

from xdeepserve.clock import SYSTEM_CLOCK, Clock
from xdeepserve.errors import RequestError
from xdeepserve.maas.accounts.accounts import find_tenant
from xdeepserve.maas.accounts.secrets import new_id
from xdeepserve.maas.ledger.ledger import start_month
from xdeepserve.maas.ledger.order import MONTHLY, PREPAID, month_of
from xdeepserve.maas.storage.database import Database
from xdeepserve.maas.storage.tables import BUDGETS, CREDITS, RESERVATIONS

MAX_MICRO: Final = 10**15
"""A billion units of the currency."""

MAX_NOTE: Final = 200


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant has; micro-units.

    Attributes:
        kind: prepaid or monthly.
        amount_micro: all credits, or the limit of a month.
        spent_micro: all charges, or those of the month.
        reserved_micro: the most that running requests can cost.
        month: that `spent_micro` is of; empty when prepaid.
    """

    tenant_id: str
    kind: str
    amount_micro: int
    spent_micro: int
    reserved_micro: int
    month: str

    @property
    def left_micro(self) -> int:
        """What another request may cost."""
        return self.amount_micro - self.spent_micro - self.reserved_micro


class Budgets:
    """Reads and changes budgets. A tenant without one may spend without a limit."""

    def __init__(self, database: Database, clock: Clock = SYSTEM_CLOCK) -> None:
        self._database = database
        self._clock = clock

    def set_monthly(self, tenant: str, micro: int) -> Budget:
        """From now on the tenant (id or name) may spend so much in a month.

        Raises:
            NotFoundError: there is no such tenant.
            RequestError: not an amount, or the tenant pays in advance.
        """
        if not 0 <= micro <= MAX_MICRO:
            raise RequestError(f"a budget of {micro} must be within 0 and {MAX_MICRO} micro-units")
        with self._database.writing() as connection:
            tenant_id = find_tenant(connection, tenant).id
            self._open(connection, tenant_id, MONTHLY)
            _change(connection, tenant_id, amount_micro=micro)
            return self._budget(connection, tenant_id)

    def add_credit(self, tenant: str, micro: int, note: str = "") -> Budget:
        """The tenant (id or name) has paid so much in advance; negative to take it back.

        Raises:
            NotFoundError: there is no such tenant.
            RequestError: not an amount, more than is left, or the tenant has a monthly budget.
        """
        if micro == 0 or abs(micro) > MAX_MICRO or len(note) > MAX_NOTE:
            raise RequestError(
                f"a credit of {micro} must be within {MAX_MICRO} micro-units and not 0, and its "
                f"note have at most {MAX_NOTE} characters"
            )
        with self._database.writing() as connection:
            tenant_id = find_tenant(connection, tenant).id
            self._open(connection, tenant_id, PREPAID)
            if self._budget(connection, tenant_id).left_micro + micro < 0:
                raise RequestError("so much is not left to take back")
            _change(connection, tenant_id, amount_micro=BUDGETS.c.amount_micro + micro)
            credit = insert(CREDITS).values(
                id=new_id("credit"),
                tenant_id=tenant_id,
                micro=micro,
                note=note,
                created_us=self._now_us(),
            )
            connection.execute(credit)
            return self._budget(connection, tenant_id)

    def show(self, tenant: str) -> Budget | None:
        """Of a tenant (id or name); None = without a limit.

        Raises:
            NotFoundError: there is no such tenant.
        """
        with self._database.writing() as connection:  # a month may begin
            tenant_id = find_tenant(connection, tenant).id
            start_month(connection, tenant_id, month_of(self._now_us()))
            return _find(connection, tenant_id)

    def _open(self, connection: Connection, tenant_id: str, kind: str) -> None:
        """Make the budget where there is none, holding what runs already."""
        if connection.dialect.name != "sqlite":  # no reservation may come in between
            connection.execute(text("LOCK TABLE reservations IN SHARE ROW EXCLUSIVE MODE"))
        found = _find(connection, tenant_id)
        if found is not None and found.kind != kind:
            raise RequestError(f"the tenant has a {found.kind} budget; it cannot become {kind}")
        if found is not None:
            return
        held = select(func.coalesce(func.sum(RESERVATIONS.c.reserved_micro), 0))
        held = held.where(RESERVATIONS.c.tenant_id == tenant_id)
        budget = Budget(
            tenant_id=tenant_id,
            kind=kind,
            amount_micro=0,
            spent_micro=0,
            reserved_micro=int(connection.execute(held).scalar_one()),
            month=month_of(self._now_us()) if kind == MONTHLY else "",
        )
        connection.execute(insert(BUDGETS).values(msgspec.structs.asdict(budget)))

    def _budget(self, connection: Connection, tenant_id: str) -> Budget:
        start_month(connection, tenant_id, month_of(self._now_us()))
        found = _find(connection, tenant_id)
        assert found is not None, "just made"
        return found

    def _now_us(self) -> int:
        return int(self._clock.wall() * 1e6)


def _find(connection: Connection, tenant_id: str) -> Budget | None:
    wanted = select(BUDGETS).where(BUDGETS.c.tenant_id == tenant_id)
    row = connection.execute(wanted).mappings().first()
    return None if row is None else Budget(**row)


def _change(connection: Connection, tenant_id: str, **values: Any) -> None:
    connection.execute(update(BUDGETS).where(BUDGETS.c.tenant_id == tenant_id).values(**values))
