"""Accounts: what is made is found, what is wrong is refused, secrets are nowhere."""

from __future__ import annotations

import msgspec
import pytest
from sqlalchemy import select

from xdeepserve.errors import NotFoundError, RequestError
from xdeepserve.maas.accounts.accounts import Accounts
from xdeepserve.maas.accounts.records import KeyLimits, Scope
from xdeepserve.maas.accounts.secrets import PREFIX, digest_of
from xdeepserve.maas.storage.database import Database, DuplicateError
from xdeepserve.maas.storage.tables import API_KEYS
from xdeepserve.testing.fake_clock import FakeClock


@pytest.fixture
def accounts(database: Database) -> Accounts:
    return Accounts(database, FakeClock(wall_s=1000.0))


def test_a_tenant_has_a_project(accounts: Accounts) -> None:
    tenant = accounts.create_tenant(" Acme ")
    assert (tenant.name, tenant.created_us) == ("Acme", 1_000_000_000)
    assert accounts.list_tenants() == [tenant]
    assert [project.name for project in accounts.list_projects("Acme")] == ["default"]
    second = accounts.create_project(tenant.id, "lab")
    assert second in accounts.list_projects(tenant.id)


def test_names_are_unique(accounts: Accounts) -> None:
    accounts.create_tenant("a")
    accounts.create_tenant("b")
    with pytest.raises(DuplicateError, match="'a' exists"):
        accounts.create_tenant("a")
    accounts.create_project("a", "lab")
    accounts.create_project("b", "lab")
    with pytest.raises(DuplicateError, match="'lab' already"):
        accounts.create_project("a", "lab")
    assert len(accounts.list_tenants()) == 2


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 101, "\x1b[2J"])
def test_bad_names(accounts: Accounts, name: str) -> None:
    with pytest.raises(RequestError):
        accounts.create_tenant(name)
    assert accounts.list_tenants() == []


def test_a_key_is_found_by_its_secret_alone(accounts: Accounts, database: Database) -> None:
    tenant = accounts.create_tenant("a")
    limits = KeyLimits(models=("m",), networks=("10.0.0.0/8", "::1"))
    new = accounts.create_key("a", "ci", limits=limits, expires_us=2_000_000_000)
    assert new.secret.startswith(PREFIX)
    assert len(new.secret) > 40
    assert accounts.find_key(digest_of(new.secret)) == new.key
    assert accounts.find_key(digest_of(new.secret + "x")) is None
    assert new.key.tenant_id == tenant.id
    assert new.key.limits.networks == ("10.0.0.0/8", "::1/128")
    with database.reading() as connection:
        (row,) = connection.execute(select(API_KEYS)).all()
    assert new.secret not in repr(row)
    assert new.secret not in msgspec.json.encode(accounts.list_keys()).decode()
    assert new.secret.endswith(new.key.hint)


def test_keys_of_a_tenant(accounts: Accounts) -> None:
    for name in ("a", "b"):
        accounts.create_tenant(name)
    assert not accounts.has_keys()
    first = accounts.create_key("a", "one").key
    accounts.create_project("b", "lab")
    second = accounts.create_key("b", "two", project="lab", scope=Scope.ADMIN).key
    assert accounts.has_keys()
    assert accounts.list_keys("a") == [first]
    assert accounts.list_keys("b") == [second]
    assert {key.id for key in accounts.list_keys()} == {first.id, second.id}


def test_a_key_is_revoked_once(database: Database) -> None:
    clock = FakeClock(wall_s=1.0)
    accounts = Accounts(database, clock)
    accounts.create_tenant("a")
    key = accounts.create_key("a", "one").key
    assert key.is_valid(1_000_000)
    clock.advance(4.0)
    revoked = accounts.revoke_key(key.id)
    assert revoked.revoked_us == 5_000_000
    assert not revoked.is_valid(1_000_000)
    clock.advance(1.0)
    assert accounts.revoke_key(key.id) == revoked
    assert accounts.has_keys()


def test_what_is_not_there(accounts: Accounts) -> None:
    accounts.create_tenant("a")
    accounts.create_tenant("b")
    foreign = accounts.create_project("b", "lab")
    for work in (
        lambda: accounts.create_key("nobody", "k"),
        lambda: accounts.create_key("a", "k", project=foreign.id),
        lambda: accounts.list_projects("nobody"),
        lambda: accounts.list_keys("nobody"),
        lambda: accounts.create_project("nobody", "p"),
        lambda: accounts.revoke_key("key-nothing"),
    ):
        with pytest.raises(NotFoundError):
            work()
    assert not accounts.has_keys()


def test_bad_keys(accounts: Accounts) -> None:
    accounts.create_tenant("a")
    with pytest.raises(RequestError, match="no network"):
        accounts.create_key("a", "k", limits=KeyLimits(networks=("10.0.0.1/8",)))
    with pytest.raises(RequestError, match="more than 100"):
        accounts.create_key("a", "k", limits=KeyLimits(models=("m",) * 101))
    for expires_us in (1_000_000_000, -1, 1 << 70):
        with pytest.raises(RequestError, match="after now"):
            accounts.create_key("a", "k", expires_us=expires_us)
    assert not accounts.has_keys()
