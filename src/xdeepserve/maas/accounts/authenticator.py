"""From the Authorization header to a Caller, with the keys that were seen lately in memory.

A key that was found is believed for a second, so that it is refused within one after it was
revoked, by every gateway; and for a minute where the database does not answer. A key that was not
found is never remembered. Whatever is wrong with a key, the answer is the same.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Final

from xdeepserve.clock import SYSTEM_CLOCK, Clock
from xdeepserve.errors import CapacityError, XDeepServeError
from xdeepserve.maas.accounts.accounts import Accounts
from xdeepserve.maas.accounts.caller import Caller
from xdeepserve.maas.accounts.records import ApiKey, Scope
from xdeepserve.maas.accounts.secrets import MAX_LENGTH, digest_of
from xdeepserve.maas.storage.database import Database, DatabaseError

FRESH_S: Final = 1.0
GRACE_S: Final = 60.0
MAX_KEYS: Final = 10_000


class AuthenticationError(XDeepServeError):
    """No key, or one that is not good here (401); the text does not say which."""

    status = 401
    error_type = "invalid_request_error"


@dataclass(frozen=True, slots=True)
class _Seen:
    key: ApiKey
    at_s: float


class Authenticator:
    """Checks keys against the accounts of a database; lives on the event loop.

    Args:
        scope: what a key must be for.
    """

    def __init__(
        self,
        database: Database,
        *,
        scope: Scope = Scope.INFERENCE,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._database = database
        self._accounts = Accounts(database, clock)
        self._scope = scope
        self._clock = clock
        self._seen: OrderedDict[bytes, _Seen] = OrderedDict()
        self._looking: dict[bytes, asyncio.Task[ApiKey | None]] = {}

    async def caller(self, authorization: str, address: str | None) -> Caller:
        """Who has the key of an Authorization header and calls from `address`.

        Raises:
            AuthenticationError: nobody.
            DatabaseError, CapacityError: the key is not known here and cannot be looked up now.
        """
        secret = _bearer(authorization)
        key = await self._key(digest_of(secret)) if secret else None
        is_good = (
            key is not None
            and key.is_valid(int(self._clock.wall() * 1e6))
            and key.scope is self._scope
            and _is_within(address, key.limits.networks)
        )
        if key is None or not is_good:
            raise AuthenticationError(
                "a valid API key is needed; send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
            )
        return Caller.of_key(key)

    async def _key(self, digest: bytes) -> ApiKey | None:
        seen, now_s = self._seen.get(digest), self._clock.monotonic()
        if seen is not None and now_s - seen.at_s < FRESH_S:
            return seen.key
        try:
            return await asyncio.shield(self._lookup(digest))
        except (DatabaseError, CapacityError):
            if seen is not None and now_s - seen.at_s < GRACE_S:
                return seen.key
            raise

    def _lookup(self, digest: bytes) -> asyncio.Task[ApiKey | None]:
        """One look at the database, however many requests wait for the same key."""
        if digest not in self._looking:
            self._looking[digest] = asyncio.create_task(self._look(digest))
        return self._looking[digest]

    async def _look(self, digest: bytes) -> ApiKey | None:
        asked_s = self._clock.monotonic()
        try:
            key = await self._database.run(partial(self._accounts.find_key, digest))
        finally:
            del self._looking[digest]
        self._seen.pop(digest, None)
        if key is not None:
            self._seen[digest] = _Seen(key, asked_s)
            if len(self._seen) > MAX_KEYS:
                self._seen.popitem(last=False)
        return key


def _bearer(authorization: str) -> str:
    """The secret of the header; empty when it holds none."""
    kind, _, secret = authorization.partition(" ")
    secret = secret.strip()
    return secret if kind.lower() == "bearer" and len(secret) <= MAX_LENGTH else ""


def _is_within(address: str | None, networks: tuple[str, ...]) -> bool:
    if not networks:
        return True
    try:
        client = ipaddress.ip_address(address or "")
    except ValueError:
        return False
    mapped = getattr(client, "ipv4_mapped", None)  # as a socket for both kinds shows IPv4
    return any((mapped or client) in ipaddress.ip_network(network) for network in networks)
