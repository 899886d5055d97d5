"""ASGI wrapper in front of all routes: which hosts a request may name, and whose key it needs.

Closed by default: a route answers without a key only when it is named here. What counts is the
path that is routed, never a URL that was put together from headers.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from xdeepserve.errors import RequestError, XDeepServeError
from xdeepserve.maas.accounts.caller import KeyChecker, let_in
from xdeepserve.maas.gateway import Gateway
from xdeepserve.maas.http_errors import on_error
from xdeepserve.maas.ledger.billing import Billing

PUBLIC_PATHS: Final = frozenset({"/health", "/ready"})


Companion = Callable[[Gateway], AbstractAsyncContextManager[None]]
"""Runs beside an app: entered when it starts, left when it stops."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who gets into a service and who pays; nothing is set on an open one.

    Attributes:
        keys: checks them.
        billing: opens charges.
        admin: the admin API, for the operator.
    """

    keys: KeyChecker | None = None
    billing: Billing | None = None
    admin: Companion | None = None


OPEN: Final = Access()
"""Whoever reaches the service may use it, and nobody pays."""


class WrongHostError(RequestError):
    """The Host header names another machine (421)."""

    status = 421


class AccessMiddleware:
    """Refuses requests before any route sees them.

    Args:
        keys: None on an open service.
        hosts: names by which clients may call this machine. Addresses and `localhost` always
            serve: what a hostile web page can make a browser send here carries a name.
    """

    def __init__(self, app: ASGIApp, *, keys: KeyChecker | None, hosts: Iterable[str]) -> None:
        self._app = app
        self._keys = keys
        self._hosts = frozenset(host.strip().lower() for host in hosts if host.strip())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PUBLIC_PATHS:
            try:
                await self._check(scope)
            except XDeepServeError as exc:
                await on_error(Request(scope), exc)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _check(self, scope: Scope) -> None:
        host = _header(scope, b"host")
        if not self._is_ours(host):
            raise WrongHostError(
                f"this is not {host[:100]!r}; the service answers to its addresses, localhost "
                "and the names in --allowed-hosts",
                code="wrong_host",
            )
        if self._keys is not None:
            address = scope["client"][0] if scope.get("client") else None
            authorization = _header(scope, b"authorization")
            let_in(scope, await self._keys.caller(authorization, address))

    def _is_ours(self, host: str) -> bool:
        name = _name_of(host)
        return name in ("", "localhost") or name in self._hosts or _is_address(name)


def _header(scope: Scope, name: bytes) -> str:
    """The value of a header; several together are no name and no key that anybody has."""
    values = [value for key, value in scope["headers"] if key == name]
    return str(b", ".join(values).decode("latin-1"))


def _name_of(host: str) -> str:
    """Without the port: `[::1]:8000` -> `::1`."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
