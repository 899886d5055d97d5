"""Brings a database to the schema that this version writes.

Migrations only ever add, so that a gateway of the version before works on beside a new one.
"""

from __future__ import annotations

import logging
from typing import Final

from sqlalchemy import Connection, inspect, text

from xdeepserve.errors import ConfigError
from xdeepserve.maas.storage.database import Database

logger = logging.getLogger(__name__)

HEAD: Final = "0002"
"""The latest migration in `migrations/versions`."""

_LOCK_KEY: Final = 0x786473  # of an advisory lock: "xds"


def upgrade(database: Database) -> None:
    """Run the migrations that are missing; several processes may do so at once.

    Raises:
        ConfigError: the database was written by a later version.
        DatabaseError: it cannot be reached or changed.
    """
    with database.reading() as connection:
        version = _version(connection)
    if version == HEAD:
        return
    if version is not None and version > HEAD:
        raise ConfigError(
            f"the database has schema {version}, this version knows {HEAD}; start the later one"
        )
    with database.writing() as connection:
        if not database.is_sqlite:  # SQLite's writer is alone anyway
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
        _migrate(connection)
    logger.info("the database has schema %s", HEAD)


def _version(connection: Connection) -> str | None:
    """Of the last migration that ran; None on an empty database."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _migrate(connection: Connection) -> None:
    from alembic import command  # slow to import, and rarely needed
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "xdeepserve.maas.storage:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
