"""Every table of the service's database, as the latest migration leaves it.

```
tenants 1--n projects 1--n api_keys
tenants 1--1 budgets   tenants 1--n credits
tenants 1--n reservations ── settled into ─> charges
```

Times are whole microseconds since the epoch, in UTC; money is in whole micro-units of the currency.
Rows are never deleted, for bills refer to them; but a reservation lives as long as its request.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

METADATA: Final = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)

ID_LENGTH: Final = 40
NAME_LENGTH: Final = 100
DIGEST_LENGTH: Final = 32

TENANTS: Final = Table(
    "tenants",
    METADATA,
    Column("id", String(ID_LENGTH), primary_key=True),
    Column("name", String(NAME_LENGTH), nullable=False, unique=True),
    Column("created_us", BigInteger, nullable=False),
)

PROJECTS: Final = Table(
    "projects",
    METADATA,
    Column("id", String(ID_LENGTH), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("name", String(NAME_LENGTH), nullable=False),
    Column("created_us", BigInteger, nullable=False),
    UniqueConstraint("tenant_id", "name"),
)

API_KEYS: Final = Table(
    "api_keys",
    METADATA,
    Column("id", String(ID_LENGTH), primary_key=True),
    Column("project_id", ForeignKey("projects.id"), nullable=False, index=True),
    Column("name", String(NAME_LENGTH), nullable=False),
    Column("digest", LargeBinary(DIGEST_LENGTH), nullable=False, unique=True),  # SHA-256
    Column("hint", String(16), nullable=False),  # the last characters, to tell keys apart
    Column("scope", String(16), nullable=False),
    Column("models", JSON, nullable=False),  # names; empty = all
    Column("networks", JSON, nullable=False),  # CIDR; empty = from anywhere
    Column("created_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger),
    Column("revoked_us", BigInteger),
)

BUDGETS: Final = Table(
    "budgets",
    METADATA,
    Column("tenant_id", ForeignKey("tenants.id"), primary_key=True),
    Column("kind", String(16), nullable=False),  # prepaid, monthly
    Column("amount_micro", BigInteger, nullable=False),  # all credits, or the limit of a month
    Column("spent_micro", BigInteger, nullable=False),  # all charges, or those of the month
    Column("reserved_micro", BigInteger, nullable=False),  # the sum over reservations
    Column("month", String(7), nullable=False),  # that spent_micro is of, as 2026-11
)

CREDITS: Final = Table(
    "credits",
    METADATA,
    Column("id", String(ID_LENGTH), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False, index=True),
    Column("micro", BigInteger, nullable=False),
    Column("note", String(200), nullable=False),
    Column("created_us", BigInteger, nullable=False),
)


def _order_columns() -> list[Column[Any]]:
    """What is known of a request when it is accepted; the same in reservations and charges."""
    return [
        Column("request_id", String(64), primary_key=True),
        Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
        Column("project_id", ForeignKey("projects.id"), nullable=False),
        Column("key_id", ForeignKey("api_keys.id"), nullable=False),
        Column("model", String(200), nullable=False),
        Column("tier_asked", String(16), nullable=False),
        Column("tier_served", String(16), nullable=False),
        Column("price_version", String(100), nullable=False),
        Column("input_price", BigInteger, nullable=False),
        Column("cached_price", BigInteger, nullable=False),
        Column("output_price", BigInteger, nullable=False),
        Column("accepted_us", BigInteger, nullable=False),
    ]


RESERVATIONS: Final = Table(
    "reservations",
    METADATA,
    *_order_columns(),
    Column("reserved_micro", BigInteger, nullable=False),
)

CHARGES: Final = Table(
    "charges",
    METADATA,
    *_order_columns(),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("charge_micro", BigInteger, nullable=False),
    Column("finish_reason", String(16), nullable=False),
    Column("finished_us", BigInteger, nullable=False),
    Column("settled_us", BigInteger, nullable=False),
    Index("ix_charges_tenant_id_accepted_us", "tenant_id", "accepted_us"),
)
