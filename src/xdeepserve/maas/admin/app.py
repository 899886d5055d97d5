"""Routes of the admin API over the accounts of a database; all need a key of scope `admin`."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from xdeepserve.errors import XDeepServeError
from xdeepserve.maas.access import AccessMiddleware
from xdeepserve.maas.accounts.accounts import DEFAULT_PROJECT, Accounts
from xdeepserve.maas.accounts.caller import KeyChecker
from xdeepserve.maas.accounts.records import KeyLimits, Scope
from xdeepserve.maas.body import parse_json, read_body
from xdeepserve.maas.http_errors import ClientGone, on_client_gone, on_error, on_http_exception
from xdeepserve.maas.request_id import RequestIdMiddleware
from xdeepserve.maas.storage.database import Database

MAX_BODY_BYTES = 64 << 10


class NameBody(msgspec.Struct, forbid_unknown_fields=True):
    """What a tenant or a project is made from."""

    name: str


class KeyBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What a key is made from; see `Accounts.create_key`."""

    name: str = "key"
    project: str = DEFAULT_PROJECT
    scope: Scope = Scope.INFERENCE
    limits: KeyLimits = KeyLimits()
    expires_us: int | None = None


class AdminHandlers:
    """One method per route. The accounts block, so they are asked on the database's threads."""

    def __init__(self, database: Database, registry: CollectorRegistry) -> None:
        self._database = database
        self._accounts = Accounts(database)
        self._registry = registry

    def routes(self) -> list[Route]:
        """All of the API."""
        tenants, tenant = "/admin/tenants", "/admin/tenants/{tenant}"
        return [
            Route(tenants, self.create_tenant, methods=["POST"]),
            Route(tenants, self.list_tenants, methods=["GET"]),
            Route(f"{tenant}/projects", self.create_project, methods=["POST"]),
            Route(f"{tenant}/projects", self.list_projects, methods=["GET"]),
            Route(f"{tenant}/keys", self.create_key, methods=["POST"]),
            Route(f"{tenant}/keys", self.list_keys, methods=["GET"]),
            Route("/admin/keys/{key}", self.revoke_key, methods=["DELETE"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]

    async def create_tenant(self, request: Request) -> Response:
        body = await _body(request, NameBody)
        return await self._reply(partial(self._accounts.create_tenant, body.name), 201)

    async def list_tenants(self, request: Request) -> Response:
        return await self._reply(self._accounts.list_tenants)

    async def create_project(self, request: Request) -> Response:
        body = await _body(request, NameBody)
        tenant = request.path_params["tenant"]
        return await self._reply(partial(self._accounts.create_project, tenant, body.name), 201)

    async def list_projects(self, request: Request) -> Response:
        tenant = request.path_params["tenant"]
        return await self._reply(partial(self._accounts.list_projects, tenant))

    async def create_key(self, request: Request) -> Response:
        body = await _body(request, KeyBody)
        work = partial(
            self._accounts.create_key,
            request.path_params["tenant"],
            body.name,
            project=body.project,
            scope=body.scope,
            limits=body.limits,
            expires_us=body.expires_us,
        )
        return await self._reply(work, 201)

    async def list_keys(self, request: Request) -> Response:
        return await self._reply(partial(self._accounts.list_keys, request.path_params["tenant"]))

    async def revoke_key(self, request: Request) -> Response:
        return await self._reply(partial(self._accounts.revoke_key, request.path_params["key"]))

    async def metrics(self, request: Request) -> Response:
        """Of the gateway, all tenants together."""
        text = generate_latest(self._registry)
        return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def _reply(self, work: Any, status: int = 200) -> Response:
        found = await self._database.run(work)
        return Response(msgspec.json.encode(found), status, media_type="application/json")


async def _body(request: Request, kind: type[Any]) -> Any:
    return parse_json(await read_body(request, max_bytes=MAX_BODY_BYTES), kind)


def create_admin_app(
    database: Database, keys: KeyChecker, registry: CollectorRegistry, hosts: list[str]
) -> Starlette:
    """The ASGI app.

    Args:
        keys: checks for scope `admin`.
        registry: what `/metrics` shows.
        hosts: see AccessMiddleware.
    """
    return Starlette(
        routes=AdminHandlers(database, registry).routes(),
        middleware=[
            Middleware(RequestIdMiddleware),
            Middleware(AccessMiddleware, keys=keys, hosts=hosts),
        ],
        exception_handlers={
            XDeepServeError: on_error,
            HTTPException: on_http_exception,
            ClientGone: on_client_gone,
        },
    )
