"""Tenants, projects and keys as values; what the database holds, without the key's digest."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Scope(StrEnum):
    """What a key opens."""

    INFERENCE = "inference"
    ADMIN = "admin"


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """Who pays.

    Attributes:
        id: `tenant-...`.
        name: unique.
        created_us: microseconds since the epoch, as all times here.
    """

    id: str
    name: str
    created_us: int


class Project(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a tenant that has keys of its own.

    Attributes:
        id: `proj-...`.
        name: unique in its tenant.
    """

    id: str
    tenant_id: str
    name: str
    created_us: int


class KeyLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a key is good for; an empty tuple allows everything.

    Attributes:
        models: names of models.
        networks: addresses or CIDR ranges of clients.
    """

    models: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key without its secret, which nobody knows but its owner.

    Attributes:
        id: `key-...`.
        hint: the last characters of the secret.
        expires_us: None = never.
        revoked_us: None = it is valid until it expires.
    """

    id: str
    tenant_id: str
    project_id: str
    name: str
    hint: str
    scope: Scope
    limits: KeyLimits
    created_us: int
    expires_us: int | None = None
    revoked_us: int | None = None

    def is_valid(self, now_us: int) -> bool:
        """Neither revoked nor expired."""
        return self.revoked_us is None and (self.expires_us is None or now_us < self.expires_us)


class NewKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key on the day it is made: the only time that its secret is shown."""

    key: ApiKey
    secret: str
