"""Alembic's entry: runs migrations in the transaction of `schema.upgrade`."""

from __future__ import annotations

from alembic import context

from xdeepserve.maas.storage.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    render_as_batch=True,
)
context.run_migrations()
