"""Budgets, credits, reservations and charges."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "budgets",
        sa.Column("tenant_id", sa.String(40), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("amount_micro", sa.BigInteger(), nullable=False),
        sa.Column("spent_micro", sa.BigInteger(), nullable=False),
        sa.Column("reserved_micro", sa.BigInteger(), nullable=False),
        sa.Column("month", sa.String(7), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", name="pk_budgets"),
        _refers("budgets", "tenant_id", "tenants"),
    )
    op.create_table(
        "credits",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("tenant_id", sa.String(40), nullable=False),
        sa.Column("micro", sa.BigInteger(), nullable=False),
        sa.Column("note", sa.String(200), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_credits"),
        _refers("credits", "tenant_id", "tenants"),
    )
    op.create_index("ix_credits_tenant_id", "credits", ["tenant_id"])
    reserved = sa.Column("reserved_micro", sa.BigInteger(), nullable=False)
    op.create_table("reservations", *_order_columns("reservations"), reserved)
    op.create_table(
        "charges",
        *_order_columns("charges"),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("charge_micro", sa.BigInteger(), nullable=False),
        sa.Column("finish_reason", sa.String(16), nullable=False),
        sa.Column("finished_us", sa.BigInteger(), nullable=False),
        sa.Column("settled_us", sa.BigInteger(), nullable=False),
    )
    op.create_index("ix_charges_tenant_id_accepted_us", "charges", ["tenant_id", "accepted_us"])


def _refers(table: str, column: str, other: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [f"{other}.id"], name=f"fk_{table}_{column}")


def _order_columns(table: str) -> list[Any]:
    return [
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("tenant_id", sa.String(40), nullable=False),
        sa.Column("project_id", sa.String(40), nullable=False),
        sa.Column("key_id", sa.String(40), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("tier_asked", sa.String(16), nullable=False),
        sa.Column("tier_served", sa.String(16), nullable=False),
        sa.Column("price_version", sa.String(100), nullable=False),
        sa.Column("input_price", sa.BigInteger(), nullable=False),
        sa.Column("cached_price", sa.BigInteger(), nullable=False),
        sa.Column("output_price", sa.BigInteger(), nullable=False),
        sa.Column("accepted_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("request_id", name=f"pk_{table}"),
        _refers(table, "tenant_id", "tenants"),
        _refers(table, "project_id", "projects"),
        _refers(table, "key_id", "api_keys"),
    ]
