"""What was used and what it cost: sums over the ledger's charges, by day, key, model and tier."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import func, select

from xdeepserve.maas.ledger.usage_row import DAY_US, UsageQuery, UsageRow
from xdeepserve.maas.storage.database import Database
from xdeepserve.maas.storage.tables import CHARGES

_COLUMNS: Final = {
    "day": (CHARGES.c.accepted_us - CHARGES.c.accepted_us % DAY_US).label("day_us"),
    "tenant": CHARGES.c.tenant_id.label("tenant"),
    "project": CHARGES.c.project_id.label("project"),
    "key": CHARGES.c.key_id.label("key"),
    "model": CHARGES.c.model,
    "tier": CHARGES.c.tier_served.label("tier"),
}
_SUMS: Final = ("prompt_tokens", "cached_tokens", "completion_tokens", "charge_micro")


def usage(
    database: Database,
    query: UsageQuery,
    *,
    tenant_id: str | None = None,
    project_id: str | None = None,
) -> list[UsageRow]:
    """One row per group that has charges, ascending. Blocks.

    Args:
        query: checked.
        tenant_id: only theirs.
        project_id: only its.

    Raises:
        DatabaseError: it cannot answer.
    """
    columns = [_COLUMNS[name] for name in query.groups]
    sums = [func.coalesce(func.sum(CHARGES.c[name]), 0).label(name) for name in _SUMS]
    wanted = select(*columns, func.count().label("num_requests"), *sums).where(
        CHARGES.c.accepted_us >= query.from_us, CHARGES.c.accepted_us < query.to_us
    )
    for column, value in ((CHARGES.c.tenant_id, tenant_id), (CHARGES.c.project_id, project_id)):
        if value is not None:
            wanted = wanted.where(column == value)
    if columns:
        wanted = wanted.group_by(*columns).order_by(*columns)
    with database.reading() as connection:
        return [_usage_row(row) for row in connection.execute(wanted).mappings()]


def _usage_row(row: Any) -> UsageRow:
    """PostgreSQL adds up 64-bit numbers in a wider type."""
    plain: dict[str, Any] = {
        name: value if isinstance(value, str) else int(value) for name, value in row.items()
    }
    return UsageRow(**plain)
