"""The database of accounts: where `serve` and `admin` find it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xdeepserve import envs

if TYPE_CHECKING:  # slow to import, and not needed without accounts
    from xdeepserve.maas.storage.database import Database

DEFAULT_FILE: Final = "service.db"


def has_database() -> bool:
    """Whether one is configured, or was made where it lies by default."""
    return bool(envs.DATABASE_URL.get()) or _default_path().is_file()


@contextmanager
def opened_database() -> Iterator[Database]:
    """The configured database, made when it is not there, with the schema of this version.

    Raises:
        ConfigError: the URL is wrong, or the schema is of a later version.
        DatabaseError: it cannot be reached.
    """
    from xdeepserve.maas.storage.database import Database
    from xdeepserve.maas.storage.schema import upgrade

    database = Database(envs.DATABASE_URL.get() or f"sqlite:///{_default_path()}")
    try:
        upgrade(database)
        yield database
    finally:
        database.close()


def _default_path() -> Path:
    return envs.HOME.get() / DEFAULT_FILE
