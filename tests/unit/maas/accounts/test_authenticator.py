"""Authenticator: whoever has no good key is nobody, and a revoked key ends soon, everywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tests.databases import PostgresCluster, opened
from xdeepserve.maas.accounts.accounts import Accounts
from xdeepserve.maas.accounts.authenticator import (
    FRESH_S,
    GRACE_S,
    AuthenticationError,
    Authenticator,
)
from xdeepserve.maas.accounts.records import KeyLimits, NewKey, Scope
from xdeepserve.maas.storage import database as database_module
from xdeepserve.maas.storage.database import Database, DatabaseError
from xdeepserve.testing.fake_clock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def accounts(database: Database, clock: FakeClock) -> Accounts:
    found = Accounts(database, clock)
    found.create_tenant("a")
    return found


@pytest.fixture
def doors(database: Database, accounts: Accounts, clock: FakeClock) -> Authenticator:
    return Authenticator(database, clock=clock)


def bearer(new: NewKey) -> str:
    return f"Bearer {new.secret}"


async def test_a_key_says_who_calls(accounts: Accounts, doors: Authenticator) -> None:
    new = accounts.create_key("a", "k", limits=KeyLimits(models=("m",)))
    caller = await doors.caller(bearer(new), None)
    assert (caller.tenant_id, caller.project_id) == (new.key.tenant_id, new.key.project_id)
    assert caller.key_id == new.key.id
    assert (caller.may_use("m"), caller.may_use("n")) == (True, False)
    assert caller == await doors.caller(f"bearer  {new.secret} ", None)


async def test_what_is_no_key_is_nobody(accounts: Accounts, doors: Authenticator) -> None:
    new = accounts.create_key("a", "k")
    admin = accounts.create_key("a", "k", scope=Scope.ADMIN)
    texts = set()
    for header in (
        "",
        "Bearer",
        "Bearer ",
        new.secret,
        f"Basic {new.secret}",
        f"Bearer {new.secret}x",
        f"Bearer {new.secret[:-1]}",
        f"Bearer {'x' * 10_000}",
        "Bearer ' OR 1=1 --",
        "Bearer \udcff\x00\n",
        bearer(admin),
    ):
        with pytest.raises(AuthenticationError) as caught:
            await doors.caller(header, None)
        texts.add(caught.value.message)
    assert len(texts) == 1


async def test_an_admin_key_opens_the_admin_door_alone(
    accounts: Accounts, database: Database
) -> None:
    doors = Authenticator(database, scope=Scope.ADMIN)
    admin = accounts.create_key("a", "k", scope=Scope.ADMIN)
    assert (await doors.caller(bearer(admin), None)).key_id == admin.key.id
    with pytest.raises(AuthenticationError):
        await doors.caller(bearer(accounts.create_key("a", "k")), None)


async def test_an_expired_key(accounts: Accounts, doors: Authenticator, clock: FakeClock) -> None:
    ends_us = int((clock.wall() + 10) * 1e6)
    new = accounts.create_key("a", "k", expires_us=ends_us)
    assert await doors.caller(bearer(new), None)
    clock.advance(10)
    with pytest.raises(AuthenticationError):
        await doors.caller(bearer(new), None)


async def test_a_revoked_key_ends_within_a_second(
    accounts: Accounts, doors: Authenticator, database: Database, clock: FakeClock
) -> None:
    new = accounts.create_key("a", "k")
    other = Authenticator(database, clock=clock)
    for each in (doors, other):
        assert await each.caller(bearer(new), None)
    accounts.revoke_key(new.key.id)
    clock.advance(FRESH_S)
    for each in (doors, other):
        with pytest.raises(AuthenticationError):
            await each.caller(bearer(new), None)


@pytest.mark.parametrize(
    ("networks", "address", "is_let_in"),
    [
        ((), None, True),
        (("10.0.0.0/8",), "10.1.2.3", True),
        (("10.0.0.0/8",), "11.1.2.3", False),
        (("10.0.0.0/8",), None, False),
        (("10.0.0.0/8",), "nonsense", False),
        (("10.0.0.0/8", "::1"), "::1", True),
        (("10.0.0.0/8",), "::ffff:10.1.2.3", True),
    ],
)
async def test_networks(
    accounts: Accounts,
    doors: Authenticator,
    networks: tuple[str, ...],
    address: str | None,
    is_let_in: bool,
) -> None:
    new = accounts.create_key("a", "k", limits=KeyLimits(networks=networks))
    if is_let_in:
        assert await doors.caller(bearer(new), address)
    else:
        with pytest.raises(AuthenticationError):
            await doors.caller(bearer(new), address)


class Counting:
    """Counts what is asked of a database, and fails when told to."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.is_down = False
        self._run = database.run
        monkeypatch.setattr(database, "run", self.run)

    async def run(self, work: Callable[[], Any]) -> Any:
        self.count += 1
        if self.is_down:
            raise DatabaseError("down")
        return await self._run(work)


async def test_the_database_is_asked_once_a_second(
    accounts: Accounts,
    doors: Authenticator,
    database: Database,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new, asked = accounts.create_key("a", "k"), Counting(database, monkeypatch)
    await asyncio.gather(*(doors.caller(bearer(new), None) for _ in range(50)))
    assert asked.count == 1
    await doors.caller(bearer(new), None)
    assert asked.count == 1
    clock.advance(FRESH_S)
    await doors.caller(bearer(new), None)
    assert asked.count == 2


async def test_keys_are_believed_for_a_while_when_the_database_is_down(
    accounts: Accounts,
    doors: Authenticator,
    database: Database,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new, asked = accounts.create_key("a", "k"), Counting(database, monkeypatch)
    await doors.caller(bearer(new), None)
    asked.is_down = True
    clock.advance(GRACE_S - 1)
    assert await doors.caller(bearer(new), None)
    with pytest.raises(DatabaseError):
        await doors.caller(bearer(accounts.create_key("a", "unseen")), None)
    clock.advance(1)
    with pytest.raises(DatabaseError):
        await doors.caller(bearer(new), None)
    asked.is_down = False
    assert await doors.caller(bearer(new), None)


async def test_a_client_that_leaves_does_not_take_the_lookup_along(
    accounts: Accounts, doors: Authenticator
) -> None:
    new = accounts.create_key("a", "k")
    leaving = asyncio.create_task(doors.caller(bearer(new), None))
    await asyncio.sleep(0)
    staying = asyncio.create_task(doors.caller(bearer(new), None))
    await asyncio.sleep(0)
    leaving.cancel()
    assert (await staying).key_id == new.key.id


async def test_postgres_that_was_restarted(
    cluster: PostgresCluster, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "LOCK_TIMEOUT_S", 1.0)
    with opened(cluster.new_database()) as database:
        accounts = Accounts(database)
        accounts.create_tenant("a")
        new = accounts.create_key("a", "k")
        doors = Authenticator(database, clock=clock)
        cluster.stop()
        try:
            with pytest.raises(DatabaseError):
                await doors.caller(bearer(new), None)
        finally:
            cluster.start()
        assert (await doors.caller(bearer(new), None)).key_id == new.key.id
