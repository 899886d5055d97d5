"""A database by URL: SQLite in a file beside us, or PostgreSQL. Every wait has a deadline.

SQLite is opened in WAL mode with full synchronisation, so that what was committed survives a power
cut and readers never wait for the writer. A transaction that writes takes the write lock at its
beginning: it waits for others there, and cannot fail half way because another one was faster.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from xdeepserve.errors import CapacityError, ConfigError, XDeepServeError

T = TypeVar("T")

LOCK_TIMEOUT_S: Final = 5.0
"""For another transaction to end, or a connection to become free."""

RUN_TIMEOUT_S: Final = 10.0
NUM_THREADS: Final = 4
MAX_PENDING: Final = 1024
"""Transactions that wait for a thread; beyond it callers are told at once."""

DRIVERS: Final = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg"}
UNIQUE_VIOLATION: Final = "23505"
"""PostgreSQL's SQLSTATE."""

_IS_READING: Final = "xds_is_reading"


class DatabaseError(XDeepServeError):
    """The database is down, slow, full or refuses (503)."""

    status = 503
    is_public = False  # drivers name hosts and files


class DuplicateError(XDeepServeError):
    """A row with the same unique value exists (409)."""

    status = 409
    error_type = "invalid_request_error"


class Database:
    """Connections to one database; safe to use from several threads.

    Args:
        url: `sqlite:///path`, or `postgresql://user:password@host/name`.

    Raises:
        ConfigError: another kind of URL, or its driver is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = _checked(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self._engine = _make_engine(self.url)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="database")
        self._num_pending = 0

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction: committed at the end of the block, rolled back on an exception.

        Raises:
            DuplicateError: a unique value is there already.
            DatabaseError: anything else the database says no to.
        """
        with self._connected(is_reading=False) as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads: one consistent state, and no waiting for writers.

        Raises:
            DatabaseError: the database cannot answer.
        """
        with self._connected(is_reading=True) as connection:
            yield connection

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`, which blocks, from one of the database's threads.

        A caller that is cancelled, or waited too long, does not stop it: what it writes is written
        or not, as for any other client that hangs up.

        Raises:
            CapacityError: too much waits already.
            DatabaseError: from `work`, or it took longer than RUN_TIMEOUT_S.
        """
        if self._num_pending >= MAX_PENDING:
            raise CapacityError(f"{MAX_PENDING} requests wait for the database; try again later")
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        self._num_pending += 1
        future.add_done_callback(self._on_done)
        try:
            return await asyncio.wait_for(asyncio.shield(future), RUN_TIMEOUT_S)
        except TimeoutError:
            raise DatabaseError(f"the database did not answer within {RUN_TIMEOUT_S:g} s") from None

    def close(self) -> None:
        """Let go of all connections. Idempotent; waits for what runs."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._engine.dispose()

    def _on_done(self, future: asyncio.Future[Any]) -> None:
        self._num_pending -= 1
        if not future.cancelled():
            future.exception()  # seen, also where nobody waits any more

    @contextmanager
    def _connected(self, *, is_reading: bool) -> Iterator[Connection]:
        try:
            with self._engine.connect() as plain:
                connection = plain.execution_options(**{_IS_READING: is_reading})
                with connection.begin():
                    yield connection
        except (DBAPIError, PoolTimeoutError) as exc:
            if _is_duplicate(exc):
                raise DuplicateError("a row with the same unique value exists") from exc
            raise DatabaseError(f"the database failed: {_reason(exc)}") from exc


def _checked(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError(f"not a database URL; {_SHAPES}") from None  # it may hold a password
    driver = DRIVERS.get(parsed.get_backend_name())
    if driver is None:
        raise ConfigError(f"database {parsed.get_backend_name()!r} is not supported; {_SHAPES}")
    if driver == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigError(f"a database in memory would lose bills; {_SHAPES}")
    return parsed.set(drivername=driver)


_SHAPES: Final = "give sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME"


def _make_engine(url: URL) -> Engine:
    options: dict[str, Any] = {"pool_size": NUM_THREADS, "pool_timeout": LOCK_TIMEOUT_S}
    try:
        if url.get_backend_name() != "sqlite":
            settings = f"-c lock_timeout={LOCK_TIMEOUT_S * 1e3:.0f}"
            settings += f" -c statement_timeout={RUN_TIMEOUT_S * 1e3:.0f}"
            connect = {"connect_timeout": round(LOCK_TIMEOUT_S), "options": settings}
            return create_engine(url, pool_pre_ping=True, connect_args=connect, **options)
        assert url.database, "checked"
        _touch(Path(url.database))
        engine = create_engine(
            url, connect_args={"timeout": LOCK_TIMEOUT_S, "check_same_thread": False}, **options
        )
    except (ModuleNotFoundError, NoSuchModuleError) as exc:
        raise ConfigError(f"{exc}; pip install 'xdeepserve[postgres]'") from exc
    event.listen(engine, "connect", _on_sqlite_connect)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _touch(path: Path) -> None:
    """Make the file where it is not there, for its owner alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as exc:
        raise ConfigError(f"the database {path} cannot be opened: {exc.strerror}") from exc


def _on_sqlite_connect(connection: Any, record: object) -> None:
    """Durable, concurrent, and with transactions that we begin ourselves."""
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    is_reading = connection.get_execution_options().get(_IS_READING, False)
    connection.exec_driver_sql("BEGIN" if is_reading else "BEGIN IMMEDIATE")


def _is_duplicate(exc: Exception) -> bool:
    if not isinstance(exc, IntegrityError):
        return False
    is_unique = getattr(exc.orig, "sqlstate", "") == UNIQUE_VIOLATION
    return is_unique or str(exc.orig).startswith("UNIQUE constraint failed")


def _reason(exc: Exception) -> str:
    """What the driver says, without the statement and its values."""
    return str(getattr(exc, "orig", None) or exc).strip().splitlines()[0]


def database_url(home: Path, url: str) -> str:
    """The configured URL, or that of the file which is there by default."""
    return url or f"sqlite:///{home / 'service.db'}"


def database_exists(home: Path, url: str) -> bool:
    """Whether accounts may have been configured: a URL is set, or the default file is there."""
    return bool(url) or (home / "service.db").is_file()
