"""Database: transactions are whole, waits end, the schema is what the migrations make."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import insert, select, text

from tests.databases import opened
from xdeepserve.errors import CapacityError, ConfigError
from xdeepserve.maas.storage import database as module
from xdeepserve.maas.storage.database import Database, DatabaseError, DuplicateError
from xdeepserve.maas.storage.schema import HEAD, upgrade
from xdeepserve.maas.storage.tables import METADATA, PROJECTS, TENANTS

ROW = {"id": "tenant-1", "name": "acme", "created_us": 1}


def names(database: Database) -> list[str]:
    with database.reading() as connection:
        return list(connection.execute(select(TENANTS.c.name)).scalars())


def test_migrations_make_the_tables(database: Database) -> None:
    with database.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
        version = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    assert version == HEAD
    upgrade(database)  # nothing to do


def test_many_may_upgrade_at_once(database_url: str) -> None:
    failures: list[BaseException] = []

    def start() -> None:
        try:
            with opened(database_url) as database:
                assert names(database) == []
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_later_schema_is_refused(database: Database) -> None:
    with database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match="schema 9999"):
        upgrade(database)


def test_a_transaction_that_fails_leaves_nothing(database: Database) -> None:
    def fail() -> None:
        with database.writing() as connection:
            connection.execute(insert(TENANTS).values(ROW))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert names(database) == []
    with database.writing() as connection:
        connection.execute(insert(TENANTS).values(ROW))
    assert names(database) == ["acme"]


def test_a_duplicate_is_told_from_other_failures(database: Database) -> None:
    with database.writing() as connection:
        connection.execute(insert(TENANTS).values(ROW))
    with pytest.raises(DuplicateError), database.writing() as connection:
        connection.execute(insert(TENANTS).values(ROW))
    orphan = {"id": "proj-1", "tenant_id": "tenant-9", "name": "a", "created_us": 1}
    with pytest.raises(DatabaseError, match=r"(?i)foreign key"), database.writing() as connection:
        connection.execute(insert(PROJECTS).values(orphan))


def test_what_the_database_says_shows_no_values(database: Database) -> None:
    with pytest.raises(DatabaseError) as caught, database.writing() as connection:
        connection.execute(text("SELECT secret FROM nowhere WHERE x = :x"), {"x": "s3cret"})
    assert "s3cret" not in str(caught.value)


def test_readers_do_not_wait_for_a_writer(database: Database) -> None:
    with database.writing() as connection:
        connection.execute(insert(TENANTS).values(ROW))
        assert names(database) == []
    assert names(database) == ["acme"]


def test_a_writer_waits_for_another_one_only_so_long(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_TIMEOUT_S", 0.2)
    with opened(database_url) as database, database.writing() as connection:
        connection.execute(insert(TENANTS).values(ROW))
        with pytest.raises(DatabaseError), database.writing() as other:
            other.execute(insert(TENANTS).values(ROW | {"id": "tenant-2"}))


async def test_work_that_hangs_is_given_up(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RUN_TIMEOUT_S", 0.05)
    go_on = threading.Event()
    with pytest.raises(DatabaseError, match="did not answer"):
        await database.run(go_on.wait)
    go_on.set()


async def test_too_much_work_is_refused(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PENDING", 2)
    go_on = threading.Event()
    waiting = [asyncio.create_task(database.run(go_on.wait)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(CapacityError):
        await database.run(go_on.wait)
    go_on.set()
    assert await asyncio.gather(*waiting) == [True, True]
    assert await database.run(lambda: names(database)) == []


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("nonsense", "not a database URL"),
        ("mysql://u:s3cret@host/x", "not supported"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
    ],
)
def test_bad_urls(url: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        Database(url)
    assert "s3cret" not in str(caught.value)


def test_a_database_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be opened"):
        Database(f"sqlite:///{tmp_path / 'file' / 'service.db'}")
    with pytest.raises(DatabaseError):
        upgrade(Database("postgresql://nobody@127.0.0.1:1/nothing"))


def test_only_its_owner_reads_a_database(tmp_path: Path) -> None:
    Database(f"sqlite:///{tmp_path / 'new' / 'service.db'}").close()
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "new" / "service.db").stat().st_mode & 0o777 == 0o600
