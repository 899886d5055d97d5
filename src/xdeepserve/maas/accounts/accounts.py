"""Tenants, projects and keys in the database. Blocking; from the event loop use `Database.run`."""

from __future__ import annotations

import ipaddress
import unicodedata
from typing import Any, Final

from sqlalchemy import Connection, Select, func, insert, select, update

from xdeepserve.clock import SYSTEM_CLOCK, Clock
from xdeepserve.errors import NotFoundError, RequestError
from xdeepserve.maas.accounts.records import ApiKey, KeyLimits, NewKey, Project, Scope, Tenant
from xdeepserve.maas.accounts.secrets import digest_of, hint_of, new_id, new_secret
from xdeepserve.maas.storage.database import Database, DuplicateError
from xdeepserve.maas.storage.tables import API_KEYS, NAME_LENGTH, PROJECTS, TENANTS

DEFAULT_PROJECT: Final = "default"
"""Every tenant has it from the start."""

MAX_LIMIT_ENTRIES: Final = 100

MAX_TIME_US: Final = 253_402_300_799_000_000
"""The end of the year 9999."""


class Accounts:
    """Reads and writes accounts.

    Every method raises DatabaseError where the database cannot answer.

    Args:
        database: with the schema of `storage.schema`.
    """

    def __init__(self, database: Database, clock: Clock = SYSTEM_CLOCK) -> None:
        self._database = database
        self._clock = clock

    def create_tenant(self, name: str) -> Tenant:
        """A tenant with a project named `default`.

        Raises:
            RequestError: the name is empty, too long or not printable.
            DuplicateError: it is taken.
        """
        tenant = Tenant(id=new_id("tenant"), name=_checked_name(name), created_us=self._now_us())
        try:
            with self._database.writing() as connection:
                connection.execute(insert(TENANTS).values(_row(tenant)))
                self._add_project(connection, tenant.id, DEFAULT_PROJECT)
        except DuplicateError:
            raise DuplicateError(f"a tenant {name!r} exists; choose another name") from None
        return tenant

    def create_project(self, tenant: str, name: str) -> Project:
        """A further project of a tenant.

        Args:
            tenant: its id or name.
            name: of the project.

        Raises:
            NotFoundError: there is no such tenant.
            RequestError, DuplicateError: as in `create_tenant`.
        """
        name = _checked_name(name)
        try:
            with self._database.writing() as connection:
                return self._add_project(connection, find_tenant(connection, tenant).id, name)
        except DuplicateError:
            raise DuplicateError(f"tenant {tenant!r} has a project {name!r} already") from None

    def create_key(
        self,
        tenant: str,
        name: str,
        *,
        project: str = DEFAULT_PROJECT,
        scope: Scope = Scope.INFERENCE,
        limits: KeyLimits | None = None,
        expires_us: int | None = None,
    ) -> NewKey:
        """A key of a project, with its secret.

        Args:
            tenant: id or name.
            name: for people; need not be unique.
            project: id or name, of the tenant.
            limits: what it is good for; None = everything.
            expires_us: when it ends, None = never.

        Raises:
            NotFoundError: there is no such tenant or project.
            RequestError: bad name, network, or a time that is over.
        """
        limits = _checked_limits(limits or KeyLimits())
        now_us = self._now_us()
        if expires_us is not None and not now_us < expires_us <= MAX_TIME_US:
            raise RequestError(
                f"expires_us={expires_us} must be after now ({now_us}) and at most {MAX_TIME_US} "
                "microseconds since the epoch",
                param="expires_us",
            )
        secret = new_secret()
        with self._database.writing() as connection:
            owner = _find_project(connection, find_tenant(connection, tenant), project)
            key = ApiKey(
                id=new_id("key"),
                tenant_id=owner.tenant_id,
                project_id=owner.id,
                name=_checked_name(name),
                hint=hint_of(secret),
                scope=scope,
                limits=limits,
                created_us=now_us,
                expires_us=expires_us,
            )
            connection.execute(
                insert(API_KEYS).values({**_key_row(key), "digest": digest_of(secret)})
            )
        return NewKey(key=key, secret=secret)

    def revoke_key(self, key_id: str) -> ApiKey:
        """End a key, for good. Idempotent: the first time counts.

        Raises:
            NotFoundError: there is no such key.
        """
        change = update(API_KEYS).where(API_KEYS.c.id == key_id, API_KEYS.c.revoked_us.is_(None))
        with self._database.writing() as connection:
            connection.execute(change.values(revoked_us=self._now_us()))
            row = connection.execute(_KEYS.where(API_KEYS.c.id == key_id)).mappings().first()
        if row is None:
            raise NotFoundError(f"there is no key {key_id!r}")
        return _key_of(row)

    def list_tenants(self) -> list[Tenant]:
        """All, oldest first."""
        with self._database.reading() as connection:
            rows = connection.execute(select(TENANTS).order_by(*_age(TENANTS))).mappings()
            return [Tenant(**row) for row in rows]

    def list_projects(self, tenant: str) -> list[Project]:
        """Of a tenant (id or name), oldest first.

        Raises:
            NotFoundError: there is no such tenant.
        """
        with self._database.reading() as connection:
            owner = find_tenant(connection, tenant)
            wanted = select(PROJECTS).where(PROJECTS.c.tenant_id == owner.id)
            rows = connection.execute(wanted.order_by(*_age(PROJECTS))).mappings()
            return [Project(**row) for row in rows]

    def list_keys(self, tenant: str | None = None) -> list[ApiKey]:
        """Of a tenant (id or name), or all; oldest first.

        Raises:
            NotFoundError: there is no such tenant.
        """
        with self._database.reading() as connection:
            wanted = _KEYS.order_by(*_age(API_KEYS))
            if tenant is not None:
                owner = find_tenant(connection, tenant)
                wanted = wanted.where(PROJECTS.c.tenant_id == owner.id)
            return [_key_of(row) for row in connection.execute(wanted).mappings()]

    def find_key(self, digest: bytes) -> ApiKey | None:
        """The key whose secret has this digest, also when it is revoked or expired."""
        with self._database.reading() as connection:
            found = connection.execute(_KEYS.where(API_KEYS.c.digest == digest)).mappings()
            row = found.first()
        return None if row is None else _key_of(row)

    def has_keys(self) -> bool:
        """Whether any key was ever made."""
        with self._database.reading() as connection:
            count = connection.execute(select(func.count()).select_from(API_KEYS)).scalar_one()
            return bool(count)

    def _add_project(self, connection: Connection, tenant_id: str, name: str) -> Project:
        project = Project(
            id=new_id("proj"), tenant_id=tenant_id, name=name, created_us=self._now_us()
        )
        connection.execute(insert(PROJECTS).values(_row(project)))
        return project

    def _now_us(self) -> int:
        return int(self._clock.wall() * 1e6)


_KEYS: Final[Select[Any]] = select(API_KEYS, PROJECTS.c.tenant_id).join_from(API_KEYS, PROJECTS)


def _age(table: Any) -> tuple[Any, Any]:
    return table.c.created_us, table.c.id


def _row(record: Tenant | Project) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__}


def _key_row(key: ApiKey) -> dict[str, Any]:
    row = {name: getattr(key, name) for name in key.__struct_fields__}
    limits: KeyLimits = row.pop("limits")
    del row["tenant_id"]  # it is the project's
    return row | {name: list(getattr(limits, name)) for name in limits.__struct_fields__}


def _key_of(row: Any) -> ApiKey:
    limits = KeyLimits(models=tuple(row["models"]), networks=tuple(row["networks"]))
    same = {name: row[name] for name in ApiKey.__struct_fields__ if name in row}
    return ApiKey(**same | {"scope": Scope(row["scope"]), "limits": limits})


def find_tenant(connection: Connection, named: str) -> Tenant:
    """The tenant of an id or a name.

    Raises:
        NotFoundError: there is none.
    """
    wanted = select(TENANTS).where((TENANTS.c.id == named) | (TENANTS.c.name == named))
    row = connection.execute(wanted).mappings().first()
    if row is None:
        raise NotFoundError(f"there is no tenant {named!r}")
    return Tenant(**row)


def _find_project(connection: Connection, tenant: Tenant, named: str) -> Project:
    is_named = (PROJECTS.c.id == named) | (PROJECTS.c.name == named)
    wanted = select(PROJECTS).where(PROJECTS.c.tenant_id == tenant.id, is_named)
    row = connection.execute(wanted).mappings().first()
    if row is None:
        raise NotFoundError(f"tenant {tenant.name!r} has no project {named!r}")
    return Project(**row)


def _checked_name(name: str) -> str:
    name = unicodedata.normalize("NFC", name).strip()
    if not 1 <= len(name) <= NAME_LENGTH or not name.isprintable():
        raise RequestError(
            f"the name {name[:NAME_LENGTH]!r} must have 1 to {NAME_LENGTH} printable characters",
            param="name",
        )
    return name


def _checked_limits(limits: KeyLimits) -> KeyLimits:
    """With networks in canonical form."""
    for name in limits.__struct_fields__:
        if len(getattr(limits, name)) > MAX_LIMIT_ENTRIES:
            raise RequestError(f"{name} has more than {MAX_LIMIT_ENTRIES} entries", param=name)
    return KeyLimits(
        models=limits.models,
        networks=tuple(str(_network(text)) for text in limits.networks),
    )


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text.strip())
    except ValueError as exc:
        raise RequestError(
            f"{text!r} is no network: {exc}; give an address, or a range like 10.0.0.0/8",
            param="networks",
        ) from None
